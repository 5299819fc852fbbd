//! While the database is away a process says so now and then, not with every try of every loop.

use std::time::Duration;

use serde_json::Value;
use tasker_shared::migrate::migrate;
use tasker_shared::store::tx;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::database_killed::Server;
use crate::harness::{DEADLINE, Setup, World};

/// How long the database is away: the point is what is said in that time.
const AWAY: Duration = Duration::from_secs(9);
/// Lines that one process may write about it.
const MOST: usize = 10;

/// What was logged until now.
fn said(log: &mut UnboundedReceiver<String>) -> Vec<String> {
    std::iter::from_fn(|| log.try_recv().ok()).collect()
}

/// What is logged until the database is back, that line included.
async fn until_back(log: &mut UnboundedReceiver<String>) -> Vec<String> {
    let mut lines = Vec::new();
    let back = async {
        while let Some(line) = log.recv().await {
            let fields: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
            let back = fields["message"].as_str().is_some_and(|message| message.contains("is back after"));
            lines.push(line);
            if back {
                return;
            }
        }
        panic!("the process has ended");
    };
    let in_time = tokio::time::timeout(DEADLINE, back).await;
    in_time.unwrap_or_else(|_| panic!("it does not say that the database is back: {lines:#?}"));
    lines
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_say_once_that_the_database_is_away_and_once_that_it_is_back() {
    let server = Server::new();
    let mut local = server.start().await;
    let url = local.url();
    let pool = tx::pool(&url, &tx::PoolOptions::default()).await.expect("a pool");
    migrate(&pool).await.expect("migrated");
    pool.close().await;
    let world = World::on(url, None, Setup { orchestrators: 0, workers: 0, ..Setup::default() }).await;
    world.register_steps("one", "a: ok").await;
    let (orchestrator, mut of_orchestrator) = world.logged_orchestrator().await;
    let (crew, mut of_crew) = world.logged_crew("crew").await;
    let before = world.submit("one").await;
    assert_eq!(world.finish(&[before]).await, ["complete"]);
    drop((said(&mut of_orchestrator), said(&mut of_crew)));

    drop(local);
    server.stop().await;
    tokio::time::sleep(AWAY).await;
    let meanwhile = [said(&mut of_orchestrator), said(&mut of_crew)];
    let counts = meanwhile.each_ref().map(Vec::len);
    eprintln!("{counts:?} lines of an orchestrator and a worker while the database was away for {AWAY:?}");
    assert!(counts.iter().all(|count| (1..MOST).contains(count)), "{counts:?} lines: {meanwhile:#?}");

    local = server.start().await;
    for (log, mut lines) in [&mut of_orchestrator, &mut of_crew].into_iter().zip(meanwhile) {
        lines.extend(until_back(log).await);
        assert!(lines.len() <= MOST, "{} lines: {lines:#?}", lines.len());
    }
    // And it works on.
    let after = world.submit("one").await;
    assert_eq!(world.finish(&[after]).await, ["complete"]);
    for log in [&mut of_orchestrator, &mut of_crew] {
        let more: Vec<String> = said(log).into_iter().filter(|line| line.contains("the database")).collect();
        assert!(more.is_empty(), "nothing more is said of it: {more:#?}");
    }
    orchestrator.end().await;
    crew.end().await;
    world.end().await;
    drop(local);
}
