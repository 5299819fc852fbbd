//! A worker with two handlers of its own, for the template `hello.yaml`.

use serde::{Deserialize, Serialize};
use tasker_worker::{CancellationToken, StepContext, StepError, Worker};

#[derive(Deserialize)]
struct Name {
    name: String,
}

#[derive(Serialize, Deserialize)]
struct Greeting {
    text: String,
}

#[derive(Serialize)]
struct Count {
    letters: usize,
}

/// Its first attempt fails, so that there is a retry to look at.
async fn greet(ctx: StepContext, input: Name) -> Result<Greeting, StepError> {
    if ctx.attempt() == 1 {
        return Err(StepError::retry("NotAwake", "try again in a second"));
    }
    Ok(Greeting { text: format!("Hello, {}!", input.name) })
}

async fn count(_ctx: StepContext, input: Greeting) -> Result<Count, StepError> {
    Ok(Count { letters: input.text.chars().filter(|c| c.is_alphabetic()).count() })
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).ok_or("usage: hello DATABASE_URL")?;
    let stop = CancellationToken::new();
    let token = stop.clone();
    tokio::spawn(async move {
        let _ = tokio::signal::ctrl_c().await;
        token.cancel();
    });
    let worker =
        Worker::builder(url).namespace("hello").handler("hello.greet", greet).handler("hello.count", count).build()?;
    worker.run(stop).await?;
    Ok(())
}
