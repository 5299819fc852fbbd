//! A database that crashes under load costs time: nothing committed is lost, nothing good is
//! quarantined.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tasker_shared::migrate::migrate;
use tasker_shared::postgres::{Local, Options};
use tasker_shared::store::tx;

use crate::harness::{DEADLINE, Setup, World, eventually, storm};
use crate::two_orchestrators_two_workers::{assert_outcomes, register_mix, submit_mix};

/// A server of its own, stopped before its files go.
pub struct Server {
    /// Where it lives.
    pub options: Options,
    /// Dropped after the server was stopped.
    _dir: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = Local::stop(&self.options, true);
    }
}

impl Server {
    /// Nothing runs yet.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        // When we are root, the server's account has to pass through.
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).expect("chmod");
        let options = Options { linger: Duration::from_millis(100), ..Options::at(dir.path().join("home")) };
        Self { options, _dir: dir }
    }

    /// Returns when it accepts connections.
    pub async fn start(&self) -> Local {
        let options = self.options.clone();
        tokio::task::spawn_blocking(move || Local::start(&options)).await.expect("no panic").expect("a server")
    }

    /// In good order, as for maintenance; returns when it is gone.
    pub async fn stop(&self) {
        let options = self.options.clone();
        let stopping = tokio::task::spawn_blocking(move || Local::stop(&options, true));
        stopping.await.expect("no panic").expect("stopped");
    }

    /// Returns when it is gone: until then it looks alive to whoever would start it.
    pub async fn kill(&self) {
        let pid = || Local::status(&self.options).expect("a status").pid;
        let running = pid().expect("it runs");
        kill_process(Pid::from_raw(running.cast_signed()).expect("a pid"), Signal::KILL).expect("killed");
        eventually("it is gone", async || (pid() != Some(running)).then_some(())).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn crashed_database_loses_no_task_and_quarantines_no_good_message() {
    let server = Server::new();
    let mut local = server.start().await;
    let url = local.url();
    let pool = tx::pool(&url, &tx::PoolOptions::default()).await.expect("a pool");
    migrate(&pool).await.expect("migrated");
    pool.close().await;

    let world = World::on(url, None, Setup { orchestrators: 2, rust_workers: 1, ..Setup::default() }).await;
    register_mix(&world).await;
    let tasks = submit_mix(&world, storm(150, 1500)).await;
    let all = i64::try_from(tasks.len()).expect("few");
    for crash in 1..=storm(2, 10) {
        let finished = world.number("select count(*) from tasker.tasks where finished_at is not null").await;
        eventually("some more tasks end", async || {
            let now = world.number("select count(*) from tasker.tasks where finished_at is not null").await;
            (now >= finished + 20 || now >= all).then_some(())
        })
        .await;
        server.kill().await;
        drop(local);
        local = server.start().await;
        eventually(&format!("the database answers after crash {crash}"), async || {
            sqlx::query("select 1").execute(&world.pool).await.ok()
        })
        .await;
    }
    assert_outcomes(&world.finish_within(&tasks, DEADLINE * 5).await);
    world.queues_drained().await;
    world.assert_complete().await;
    assert_eq!(world.number("select count(*) from tasker.quarantine").await, 0);
    assert_eq!(world.number("select count(*) from tasker.message_failures").await, 0, "a crash is nobody's failure");
    world.end().await;
    drop(local);
}
