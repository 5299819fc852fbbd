//! A standby that is promoted goes on with every claim: workers on their way to it are not dead.

use std::process::Command;

use serde_json::json;
use sqlx::postgres::{PgConnection, PgPool};
use sqlx::{AssertSqlSafe, Connection as _, Executor as _};
use tasker_shared::migrate::migrate;
use tasker_shared::postgres::Local;
use tasker_shared::store::tx;

use crate::database_killed::Server;
use crate::harness::{Setup, World, eventually};

async fn pool(url: &str) -> PgPool {
    tx::pool(url, &tx::PoolOptions::default()).await.expect("a pool")
}

/// A stopped copy of a stopped server, which will follow the other when both run.
fn copy(of: &Server, to: &Server) {
    let script = r#"
        umask 022; mkdir -p "$2" && chmod 755 "$2" && mkdir -p "$2/pg" && chmod 711 "$2/pg" &&
        cp -a "$1/pg/data" "$2/pg/data" && cp -a "$1/pg/data/PG_VERSION" "$2/pg/data/standby.signal""#;
    let mut command = Command::new("sh");
    command.args(["-c", script, "copy"]).arg(&of.options.home).arg(&to.options.home);
    assert!(command.status().expect("sh").success());
}

/// A session that holds the lock of a worker, which has said so.
async fn session(url: &str, worker: &str, key: i64) -> PgConnection {
    let mut session = PgConnection::connect(url).await.expect("a session");
    session.execute(AssertSqlSafe(format!("select pg_advisory_lock({key})"))).await.expect("locked");
    let hello = format!("select tasker.worker_hello('{worker}', 'tests', '{{worker_tests}}', '{{ok}}', 1, {key})");
    session.execute(AssertSqlSafe(hello)).await.expect("hello");
    session
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_on_their_way_to_a_promoted_standby_are_not_dead() {
    let (primary, standby) = (Server::new(), Server::new());
    let local = primary.start().await;
    let url = local.url();
    let socket = url.split("host=").nth(1).and_then(|rest| rest.split('&').next()).expect("a socket");
    let admin = pool(&url).await;
    migrate(&admin).await.expect("migrated");
    for setting in [
        "wal_level = 'replica'".to_owned(),
        "max_wal_senders = 4".to_owned(),
        "wal_keep_size = '64MB'".to_owned(),
        format!("primary_conninfo = 'host={socket} port=5432 user=tasker'"),
    ] {
        admin.execute(AssertSqlSafe(format!("alter system set {setting}"))).await.expect("set");
    }
    admin.close().await;
    drop(local);
    // What it writes from here on tells a standby enough, and none of it lies before the copy.
    Local::stop(&primary.options, true).expect("stopped");
    let again = primary.start().await;
    Local::stop(&primary.options, true).expect("stopped");
    drop(again);
    copy(&primary, &standby);
    let local = primary.start().await;
    // It is ready for a `Local` when it was promoted, and for readers long before.
    let options = standby.options.clone();
    let promoted = tokio::task::spawn_blocking(move || Local::start(&options));
    let standby_url = Local::status(&standby.options).expect("a status").url;

    // Before anybody says hello: else its start would tell that their locks were lost.
    let mut reader =
        eventually("the standby can be read", async || PgConnection::connect(&standby_url).await.ok()).await;

    let world = World::on(url.clone(), None, Setup::by_hand()).await;
    world.register("leased", "steps: [{name: a, handler: ok, timeouts: {heartbeat: 12s}}]").await;
    let sessions = [session(&url, "lost", 8001).await, session(&url, "back", 8002).await];
    let tasks = [world.submit("leased").await, world.submit("leased").await];
    let mut claims = Vec::new();
    for worker in ["lost", "back"] {
        claims.push(
            eventually("it has claimed", async || {
                let mut conn = world.pool.acquire().await.expect("a connection");
                tasker_tests::worker::claim(&mut conn, worker, None, &["ok"], 1).await.expect("claimed").pop()
            })
            .await,
        );
    }
    eventually("the standby knows of the claims", async || {
        let claimed = "select count(*) from tasker.steps where state = 'in_progress'";
        let count: i64 = sqlx::query_scalar(claimed).fetch_one(&mut reader).await.unwrap_or_default();
        (count == 2).then_some(())
    })
    .await;

    world.end().await;
    Local::stop(&primary.options, true).expect("stopped");
    drop((sessions, local));
    let done: bool = sqlx::query_scalar("select pg_promote()").fetch_one(&mut reader).await.expect("promoted");
    assert!(done);
    let local = promoted.await.expect("no panic").expect("a server");

    // One worker is a while on its way back, the other never comes.
    let world = World::on(standby_url.clone(), None, Setup::by_hand()).await;
    eventually("the workers' locks were looked at for two seconds", async || {
        let looked = "select count(*) from tasker.timeline where timeline = '00000002' and seen_at < clock_timestamp() - interval '2 s'";
        (world.number(looked).await == 1).then_some(())
    })
    .await;
    let (of_lost, of_back) = (&claims[0], &claims[1]);
    let kept = "select count(*) from tasker.steps where state = 'in_progress' and attempt = 1";
    assert_eq!(world.number(kept).await, 2, "their leases are valid");
    let beats = json!([{"step": of_back.step, "token": of_back.token}]);
    let mut session = session(&standby_url, "back", 8002).await;
    sqlx::query("select tasker.heartbeat($1)").bind(beats).execute(&mut session).await.expect("a heartbeat");
    // By its lease, and not before.
    world.until_step(of_lost.step, &["enqueued"]).await;
    let early = "select count(*) from tasker.transitions r join tasker.attempts a on a.step_uuid = r.entity_uuid and a.attempt = 1
        where r.event = 'LeaseExpired' and r.at < a.claimed_at + interval '12 s'";
    assert_eq!(world.number(early).await, 0);
    world.succeed(of_back).await;
    let again = world.claim().await;
    assert_eq!((again.task, again.attempt), (of_lost.task, 2));
    world.succeed(&again).await;
    assert_eq!(world.finish(&tasks).await, ["complete", "complete"]);
    world.assert_sound().await;
    world.end().await;
    drop((session, local));
}
