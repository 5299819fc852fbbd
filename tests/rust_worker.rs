//! The Rust worker with the handlers of the tests, in this process or another.

use std::time::Duration;

use serde_json::{Value, json};
use tasker_worker::{Error, StepContext, StepError, Worker};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::worker::NAMESPACE;

/// A running Rust worker; it drains when this is dropped.
#[derive(Debug)]
pub struct RustWorker {
    running: JoinHandle<Result<(), Error>>,
    stop: DropGuard,
}

impl RustWorker {
    /// Begins to work. `inside` is called by every handler before it does anything, and what
    /// it answers is whether to hang there for ever.
    pub fn start(url: &str, name: &str, slots: usize, inside: fn(&StepContext) -> bool) -> Self {
        let handle = move |broken: bool, flaky: bool| {
            move |ctx: StepContext, _: Value| async move {
                if inside(&ctx) {
                    std::future::pending::<()>().await;
                }
                let span = ctx.span("inside");
                if broken {
                    span.record_error(&StepError::fail("Broken", "broken said Broken"));
                }
                span.finish();
                match ctx.attempt() {
                    _ if broken => Err(StepError::fail("Broken", "broken said Broken")),
                    1 if flaky => Err(StepError::retry("Hiccup", "flaky said Hiccup")),
                    attempt => Ok(json!({"step": ctx.step_name(), "attempt": attempt})),
                }
            }
        };
        let worker = Worker::builder(url)
            .namespace(NAMESPACE)
            .name(name)
            .version("1.2.3")
            .slots(slots)
            .drain_timeout(Duration::from_secs(10))
            .handler("ok", handle(false, false))
            .handler("flaky", handle(false, true))
            .handler("broken", handle(true, false))
            .handler("later", later)
            .builtins()
            .build()
            .expect("a worker of the tests");
        let stop = CancellationToken::new();
        let running = tokio::spawn(worker.run(stop.clone()));
        Self { running, stop: stop.drop_guard() }
    }

    /// Drains.
    ///
    /// # Panics
    /// If it did not work until now.
    pub async fn stop(self) {
        drop(self.stop);
        self.running.await.expect("no panic").expect("a worker that ran");
    }
}

/// Tells its progress, and when to try it again.
async fn later(ctx: StepContext, _: Value) -> Result<Value, StepError> {
    ctx.heartbeat(json!({"attempt": ctx.attempt()}));
    if ctx.attempt() == 1 {
        return Err(StepError::retry_after("Busy", "come back", Duration::from_millis(30)));
    }
    Ok(json!({"attempt": ctx.attempt()}))
}
