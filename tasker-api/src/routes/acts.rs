//! What is done to tasks and steps. Each is a request: it is checked now and decided by an
//! orchestrator a moment later, and the audit names the key as the actor.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};
use tasker_shared::client::wire::{Bulk, BulkAnswer};
use tasker_shared::state_machine::decide::ByHand;
use tasker_shared::store::requests::TaskRequest;

use super::tasks::{StepPath, TaskPath, visible};
use super::{Accepted, Reason};
use crate::auth::Scope;
use crate::operation::{Answer, Api, Call, Nothing, Operation, Reply};
use crate::problem::Problem;

/// A request about a whole task.
type OfTask<B> = Call<TaskPath, Nothing, B>;
/// A request about a step.
type OfStep<B> = Call<StepPath, Nothing, B>;

pub(super) fn add(api: &mut Api) {
    let operate = Scope::TasksOperate;
    let post = |path, id, about| Operation::post(path, id, about).answers(http::StatusCode::ACCEPTED);
    api.add(
        post(
            "/v1/tasks/bulk",
            "act_on_tasks",
            "Do one act to up to 1000 tasks that match; a dry run unless told otherwise",
        ),
        operate,
        bulk,
    );
    api.add(
        post("/v1/tasks/{task}/cancel", "cancel_task", "End it; running handlers are asked to stop"),
        operate,
        cancel,
    );
    api.add(
        post("/v1/tasks/{task}/terminate", "terminate_task", "End it; running handlers are dropped"),
        operate,
        terminate,
    );
    api.add(
        post("/v1/tasks/{task}/suspend", "suspend_task", "Send nothing more of it until it is resumed"),
        operate,
        |call| act(call, TaskRequest::Suspend),
    );
    api.add(post("/v1/tasks/{task}/resume", "resume_task", "Let a suspended task go on"), operate, |call| {
        act(call, TaskRequest::Resume)
    });
    api.add(post("/v1/tasks/{task}/give-up", "give_up_task", "End a blocked task as failed"), operate, |call| {
        act(call, TaskRequest::GiveUp)
    });
    api.add(
        post("/v1/tasks/{task}/resolve", "resolve_task", "End a blocked task as resolved by hand"),
        operate,
        |call| act(call, TaskRequest::Resolve),
    );
    api.add(
        post("/v1/tasks/{task}/retry", "retry_task", "Try again what failed, keeping what is done"),
        operate,
        retry,
    );
    api.add(
        post("/v1/tasks/{task}/rerun", "rerun_task", "Run a finished task again from these steps, in a new generation"),
        operate,
        rerun,
    );
    api.add(
        post(
            "/v1/tasks/{task}/signal",
            "signal_task",
            "Send a signal; the step that waits for it completes with the payload",
        ),
        Scope::TasksSignal,
        signal,
    );
    api.add(post("/v1/tasks/{task}/steps/{step}/skip", "skip_step", "The step is not needed"), operate, skip);
    api.add(
        post("/v1/tasks/{task}/steps/{step}/resolve", "resolve_step", "The step was settled outside"),
        operate,
        |call| settle(call, ByHand::Resolve),
    );
    api.add(
        post(
            "/v1/tasks/{task}/steps/{step}/complete",
            "complete_step",
            "The step counts as done by its handler, with this output",
        ),
        operate,
        |call| settle(call, ByHand::Complete),
    );
}

async fn cancel(call: OfTask<Reason>) -> Answer<Accepted> {
    visible(&call, call.path.task).await?;
    call.state.client().cancel(call.path.task, Some(&call.who.name), call.body.reason.as_deref()).await?;
    Ok(Accepted::YES.into())
}

async fn terminate(call: OfTask<Reason>) -> Answer<Accepted> {
    visible(&call, call.path.task).await?;
    call.state.client().terminate(call.path.task, Some(&call.who.name), call.body.reason.as_deref()).await?;
    Ok(Accepted::YES.into())
}

async fn act(call: OfTask<Reason>, request: TaskRequest) -> Answer<Accepted> {
    visible(&call, call.path.task).await?;
    call.state.client().act(call.path.task, request, Some(&call.who.name), call.body.reason.as_deref()).await?;
    Ok(Accepted::YES.into())
}

/// What to try again.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Retry {
    /// Of a blocked task only these failed steps; everything that failed if there are none.
    #[serde(default)]
    #[schemars(length(max = 1000))]
    steps: Vec<String>,
    /// Why, for the audit.
    #[schemars(length(max = 1000))]
    reason: Option<String>,
}

fn few(field: &str, steps: &[String]) -> Result<(), Problem> {
    if steps.len() > 1000 { Err(Problem::invalid(field, "must name at most 1000 steps")) } else { Ok(()) }
}

async fn retry(call: OfTask<Retry>) -> Answer<Accepted> {
    few("steps", &call.body.steps)?;
    visible(&call, call.path.task).await?;
    let Retry { steps, reason } = &call.body;
    call.state.client().retry_steps(call.path.task, steps, Some(&call.who.name), reason.as_deref()).await?;
    Ok(Accepted::YES.into())
}

/// From where to run again.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rerun {
    /// These steps and all that follow from them run again, the others keep what they came to.
    #[schemars(length(min = 1, max = 1000))]
    from: Vec<String>,
    /// Why, for the audit.
    #[schemars(length(max = 1000))]
    reason: Option<String>,
}

async fn rerun(call: OfTask<Rerun>) -> Answer<Accepted> {
    few("from", &call.body.from)?;
    visible(&call, call.path.task).await?;
    let Rerun { from, reason } = &call.body;
    call.state.client().rerun(call.path.task, from, Some(&call.who.name), reason.as_deref()).await?;
    Ok(Accepted::YES.into())
}

/// A signal.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Signal {
    /// What a step waits for.
    #[schemars(length(min = 1, max = 200))]
    name: String,
    /// What the step completes with.
    #[serde(default)]
    payload: Value,
}

async fn signal(call: OfTask<Signal>) -> Answer<Accepted> {
    visible(&call, call.path.task).await?;
    let Signal { name, payload } = &call.body;
    call.state.client().signal(call.path.task, name, payload, Some(&call.who.name)).await?;
    Ok(Accepted::YES.into())
}

async fn skip(call: OfStep<Reason>) -> Answer<Accepted> {
    visible(&call, call.path.task).await?;
    let (step, reason) = (&call.path.step, call.body.reason.as_deref());
    let client = call.state.client();
    client.settle_step(call.path.task, step, ByHand::Skip, None, Some(&call.who.name), reason).await?;
    Ok(Accepted::YES.into())
}

/// What a step came to.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Settled {
    /// What the steps behind it read; up to 1 MiB.
    output: Option<Value>,
    /// Why, for the audit.
    #[schemars(length(max = 1000))]
    reason: Option<String>,
}

async fn settle(call: OfStep<Settled>, by_hand: ByHand) -> Answer<Accepted> {
    visible(&call, call.path.task).await?;
    let Settled { output, reason } = call.body;
    let (client, actor) = (call.state.client(), Some(call.who.name.as_str()));
    client.settle_step(call.path.task, &call.path.step, by_hand, output, actor, reason.as_deref()).await?;
    Ok(Accepted::YES.into())
}

async fn bulk(call: Call<Nothing, Nothing, Bulk>) -> Answer<BulkAnswer> {
    let Bulk { filter, action, dry_run, reason } = call.body;
    match &filter.namespace {
        Some(namespace) => call.who.require(Scope::TasksOperate, namespace)?,
        None if call.who.namespaces().is_some() => {
            return Err(Problem::invalid("filter.namespace", "is needed: this key has only some namespaces"));
        }
        None => {}
    }
    let (filter, action) = (json!(filter), json!(action));
    let action = action.as_str().unwrap_or_default();
    let done = call.state.client().act_on_tasks(&filter, action, dry_run, Some(&call.who.name), reason.as_deref());
    let answer: BulkAnswer = serde_json::from_value(done.await?).map_err(|error| {
        tracing::error!(%error, "the answer of tasker.act_on_tasks cannot be read");
        crate::problem::INTERNAL.because("the server made a mistake; its log says more")
    })?;
    Ok(Reply::from(answer))
}
