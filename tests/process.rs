//! An orchestrator or a worker as a process of its own, so that a test can kill it.
//!
//! It says `ready` on stdout when it runs, and ends in good order when its stdin closes: so
//! none outlives the test that started it.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use tasker_orchestration::{Options, Orchestrator};
use tasker_tests::trace_config;
use tasker_tests::worker::{Worker, answer};

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["orchestrator", url, endpoint, protocol] => {
            let options = Options { trace: trace_config(endpoint, protocol), ..Options::default() };
            let orchestrator = Orchestrator::start(url, &options).await.expect("an orchestrator");
            until_stdin_closes().await;
            orchestrator.shutdown(Duration::from_secs(20)).await;
        }
        ["worker", url, name, stuck_in] => {
            let stuck_in = stuck_in.to_owned();
            let work = Arc::new(move |claim: &_| {
                let tasker_tests::worker::Claim { step_name, attempt, .. } = claim;
                if *step_name == stuck_in {
                    say(&format!("inside {step_name} {attempt}"));
                    // Inside the handler, until somebody ends the process.
                    loop {
                        std::thread::park();
                    }
                }
                answer(claim)
            });
            let worker = Worker::start(url, name, 1, work).await.expect("a worker");
            until_stdin_closes().await;
            worker.stop().await;
        }
        _ => panic!("usage: tasker-test-process orchestrator URL ENDPOINT PROTOCOL | worker URL NAME STEP_TO_HANG_IN"),
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
