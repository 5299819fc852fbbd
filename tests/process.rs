//! An orchestrator or a worker as a process of its own, so that a test can kill it.
//!
//! It says `ready` on stdout when it runs, and ends in good order when its stdin closes: so
//! none outlives the test that started it.

use std::io::{Read, Write};
use std::sync::OnceLock;
use std::time::Duration;

use tasker_orchestration::{Options, Orchestrator};
use tasker_shared::telemetry::{self, LogFormat, Role};
use tasker_shared::trace::config::TraceConfig;
use tasker_tests::rust_worker::RustWorker;
use tasker_tests::trace_config;

static STUCK_IN: OnceLock<String> = OnceLock::new();

#[tokio::main]
async fn main() {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "logged") {
        arguments.remove(0);
        telemetry::init(Role::Orchestrator, &TraceConfig::default(), LogFormat::Json);
    }
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["orchestrator", url, endpoint, protocol] => {
            let options = Options { trace: trace_config(endpoint, protocol), ..Options::default() };
            let orchestrator = Orchestrator::start(url, &options).await.expect("an orchestrator");
            until_stdin_closes().await;
            orchestrator.shutdown(Duration::from_secs(20)).await;
        }
        ["worker", url, name, stuck_in] => {
            STUCK_IN.set(stuck_in.to_owned()).expect("set once");
            let worker = RustWorker::start(url, name, 1, |ctx| {
                let stuck = STUCK_IN.get().is_some_and(|step| step == ctx.step_name());
                if stuck {
                    say(&format!("inside {} {}", ctx.step_name(), ctx.attempt()));
                }
                stuck
            });
            until_stdin_closes().await;
            worker.stop().await;
        }
        ["crew", url, name] => {
            let worker = RustWorker::start(url, name, 8, |_| false);
            until_stdin_closes().await;
            worker.stop().await;
        }
        _ => panic!(
            "usage: tasker-test-process [logged] orchestrator URL ENDPOINT PROTOCOL | worker URL NAME STEP_TO_HANG_IN | crew URL NAME"
        ),
    }
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

async fn until_stdin_closes() {
    say("ready");
    let _ = tokio::task::spawn_blocking(|| std::io::stdin().read(&mut [0])).await;
}
