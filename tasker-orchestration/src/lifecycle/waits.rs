//! What a settle reads and writes beside the plain rows for steps that run no handler. Each
//! function costs nothing where no template of the batch has such a step.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::PgConnection;
use tasker_shared::state_machine::plan::{Answer, Outcome, Signal};
use tasker_shared::state_machine::{Event, Plan, StepDefinition, StepState, TaskState};
use tasker_shared::store;
use uuid::Uuid;

use super::loaded::{LoadedTask, by_uuid};
use super::{About, Error};

/// Reads the signals that were kept for tasks whose templates wait for any; answers the steps
/// to load because one of them may end their wait now.
pub(super) async fn load_signals(
    conn: &mut PgConnection,
    tasks: &mut [LoadedTask],
    events: &[About<'_>],
) -> Result<Vec<Uuid>, Error> {
    let listening: Vec<Uuid> =
        tasks.iter().filter(|loaded| !loaded.template.signals.is_empty()).map(|loaded| loaded.task().uuid).collect();
    if listening.is_empty() {
        return Ok(Vec::new());
    }
    let mut kept: HashMap<Uuid, Vec<_>> = HashMap::new();
    for (task, signal) in kept_signals(conn, &listening).await? {
        kept.entry(task).or_default().push(signal);
    }
    let looking: HashSet<Uuid> =
        events.iter().filter(|about| *about.event == Event::SignalDue).map(|about| about.task).collect();
    let mut positions = Vec::new();
    for loaded in tasks.iter_mut() {
        let task = loaded.task().uuid;
        loaded.snapshot.signals = kept.remove(&task).unwrap_or_default();
        if looking.contains(&task) {
            let named = |name: &str| loaded.snapshot.signals.iter().any(|signal| signal.name == name);
            let waits = loaded.template.signals.iter().filter(|(_, name)| named(name));
            positions.extend(waits.map(|(index, _)| (task, *index)));
        }
    }
    if positions.is_empty() {
        return Ok(Vec::new());
    }
    // One signal ends one wait, so of many steps that wait for it only the first are loaded.
    let waiting = waiting(conn, &positions).await?;
    let mut wanted = Vec::new();
    for loaded in tasks.iter() {
        let mut left: HashMap<&str, usize> = HashMap::new();
        for signal in &loaded.snapshot.signals {
            *left.entry(&signal.name).or_default() += 1;
        }
        let names: HashMap<u32, &str> = loaded.template.signals.iter().map(|(index, name)| (*index, &**name)).collect();
        for (_, index, step) in waiting.iter().filter(|(task, ..)| *task == loaded.task().uuid) {
            let left = names.get(index).and_then(|name| left.get_mut(*name));
            if let Some(left) = left.filter(|left| **left > 0) {
                *left -= 1;
                wanted.push(*step);
            }
        }
    }
    Ok(wanted)
}

/// Reads when the steps must have ended of which hints say that they are late.
pub(super) async fn load_deadlines(
    conn: &mut PgConnection,
    tasks: &mut [LoadedTask],
    events: &[About<'_>],
) -> Result<(), Error> {
    let late = events.iter().filter_map(|about| match about.event {
        Event::StepTotalDue { step } => Some((about.task, *step)),
        _ => None,
    });
    let late: Vec<(Uuid, Uuid)> = late.collect();
    if late.is_empty() {
        return Ok(());
    }
    let mut tasks = by_uuid(tasks);
    for (task, step, at) in deadlines(conn, &late).await? {
        if let Some(loaded) = tasks.get_mut(&task)
            && let Some((key, _)) = loaded.step(step)
        {
            loaded.snapshot.deadlines.insert(key, at);
        }
    }
    Ok(())
}

/// Writes what the plans say of steps without a handler.
pub(super) async fn record(
    conn: &mut PgConnection,
    tasks: &[LoadedTask],
    plans: &[Plan],
    at: DateTime<Utc>,
) -> Result<(), Error> {
    let new_steps = plans.iter().flat_map(|plan| &plan.new_steps);
    let due: Vec<_> = new_steps.filter_map(|step| Some((step.uuid, step.due_at?))).collect();
    if !due.is_empty() {
        set_due(conn, &due).await?;
    }
    let deadlines = plans.iter().flat_map(|plan| plan.deadlines.iter().map(|(step, at)| (plan.task.uuid, *step, *at)));
    let deadlines: Vec<_> = deadlines.collect();
    if !deadlines.is_empty() {
        set_deadlines(conn, &deadlines).await?;
    }
    let answers: Vec<(Uuid, &Answer)> =
        plans.iter().flat_map(|plan| plan.answers.iter().map(|answer| (plan.task.uuid, answer))).collect();
    let used: Vec<i64> = plans.iter().flat_map(|plan| plan.used_signals.iter().copied()).collect();
    if !answers.is_empty() {
        answer(conn, &answers, &used, at).await?;
    }
    let ended: Vec<Uuid> = tasks
        .iter()
        .zip(plans)
        .filter(|(loaded, plan)| !loaded.snapshot.signals.is_empty() && plan.task.state.is_terminal())
        .map(|(loaded, _)| loaded.task().uuid)
        .collect();
    if !ended.is_empty() {
        forget_signals(conn, &ended).await?;
    }
    if let Some(over) = over(tasks, plans) {
        forget_due(conn, &over).await?;
    }
    Ok(())
}

/// The tasks and steps that these plans end and for which something may still be due. A task without
/// timeouts, waits and a delayed start has nothing, and pays for no look.
fn over(tasks: &[LoadedTask], plans: &[Plan]) -> Option<Over> {
    let mut over = Over::default();
    for (loaded, plan) in tasks.iter().zip(plans).filter(|(_, plan)| !plan.is_empty()) {
        let (task, before) = (plan.task.uuid, loaded.task());
        if plan.task.state.is_terminal() {
            let may_start =
                before.run_at.is_some() || matches!(before.state, TaskState::Pending | TaskState::Suspended);
            if loaded.template.has_timers || may_start {
                over.tasks.push(task);
            }
        }
        let ended =
            plan.steps.iter().map(|(step, _)| step).chain(&plan.new_steps).filter(|step| step.state.is_terminal());
        for step in ended {
            if loaded.template.has_timers
                && !plan.task.state.is_terminal()
                && loaded.template.definition.steps.get(step.index as usize).is_some_and(StepDefinition::has_timers)
            {
                over.steps.push((task, step.uuid));
            }
            let before = loaded.step(step.uuid).map(|(_, before)| before);
            let retrying = before.filter(|before| before.state == StepState::WaitingForRetry);
            over.retries.extend(retrying.and_then(|before| Some((task, before.due_at?))));
        }
    }
    (!over.tasks.is_empty() || !over.steps.is_empty() || !over.retries.is_empty()).then_some(over)
}

// The statements.

/// Signals of one task that are looked at in one settle; more wait for the next.
const SIGNALS: i64 = 1000;

/// The kept signals of these tasks, oldest first.
async fn kept_signals(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<Vec<(Uuid, Signal)>, store::Error> {
    let rows = sqlx::query!(
        "select s.task_uuid, s.signal_id, s.name, s.payload, s.actor, s.traceparent
         from unnest($1::uuid[]) t(task_uuid)
         cross join lateral (select * from tasker.signals k where k.task_uuid = t.task_uuid order by k.signal_id limit $2) s
         order by s.signal_id",
        task_uuids,
        SIGNALS
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let signal = Signal {
                id: row.signal_id,
                name: row.name,
                payload: row.payload,
                actor: row.actor,
                traceparent: row.traceparent,
            };
            (row.task_uuid, signal)
        })
        .collect())
}

/// Those of these positions, `(task, step index)`, where a step waits now; by task, in file order.
async fn waiting(conn: &mut PgConnection, positions: &[(Uuid, u32)]) -> Result<Vec<(Uuid, u32, Uuid)>, store::Error> {
    let tasks: Vec<Uuid> = positions.iter().map(|(task, _)| *task).collect();
    let indexes: Vec<i32> = positions.iter().map(|(_, index)| i32::try_from(*index).unwrap_or(-1)).collect();
    let rows = sqlx::query!(
        "select s.task_uuid, s.step_index, s.step_uuid
         from unnest($1::uuid[], $2::int[]) w(task_uuid, step_index)
         join tasker.steps s on s.task_uuid = w.task_uuid and s.step_index = w.step_index and s.state = 'waiting'
         order by s.task_uuid, s.step_index",
        &tasks,
        &indexes
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| (row.task_uuid, u32::try_from(row.step_index).unwrap_or_default(), row.step_uuid))
        .collect())
}

/// Writes what steps without a handler came to where a handler's result would stand, and
/// deletes the signals that they used.
async fn answer(
    conn: &mut PgConnection,
    answers: &[(Uuid, &Answer)],
    used_signals: &[i64],
    at: DateTime<Utc>,
) -> Result<(), store::Error> {
    let tasks: Vec<Uuid> = answers.iter().map(|(task, _)| *task).collect();
    let steps: Vec<Uuid> = answers.iter().map(|(_, answer)| answer.step).collect();
    let attempts: Vec<i32> = answers.iter().map(|(_, answer)| answer.attempt).collect();
    let generations: Vec<i32> = answers.iter().map(|(_, answer)| answer.generation).collect();
    let since: Vec<DateTime<Utc>> = answers.iter().map(|(_, answer)| answer.since).collect();
    let (mut outputs, mut errors) = (Vec::new(), Vec::new());
    for (_, answer) in answers {
        match &answer.outcome {
            Outcome::Success(output) => {
                outputs.push(Some(output.clone()));
                errors.push(None);
            }
            Outcome::Failure(failure) => {
                outputs.push(None);
                errors.push(Some(serde_json::json!(failure)));
            }
        }
    }
    sqlx::query!(
        "with used as (delete from tasker.signals where signal_id = any($8))
         insert into tasker.attempts (task_uuid, step_uuid, attempt, generation, claim_token, worker, claim_began_at, claimed_at,
           report_began_at, reported_at, outcome, output, error)
         select n.task_uuid, n.step_uuid, n.attempt, n.generation, gen_random_uuid(), '', n.since, n.since, $9, $9,
           case when n.error is null then 'success' else 'error' end, n.output, n.error
         from unnest($1::uuid[], $2::uuid[], $3::int[], $4::int[], $5::timestamptz[], $6::jsonb[], $7::jsonb[])
           as n(task_uuid, step_uuid, attempt, generation, since, output, error)
         on conflict do nothing",
        &tasks,
        &steps,
        &attempts,
        &generations,
        &since,
        &outputs as &[Option<Value>],
        &errors as &[Option<Value>],
        used_signals,
        at
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Says when the waits of steps that began with their task are due: the statement that creates
/// steps knows no due time, so that tasks without waits pay nothing for it.
async fn set_due(conn: &mut PgConnection, waits: &[(Uuid, DateTime<Utc>)]) -> Result<(), store::Error> {
    let (steps, due): (Vec<Uuid>, Vec<DateTime<Utc>>) = waits.iter().copied().unzip();
    sqlx::query!(
        "update tasker.steps s set due_at = n.due_at
         from unnest($1::uuid[], $2::timestamptz[]) as n(step_uuid, due_at) where s.step_uuid = n.step_uuid",
        &steps,
        &due
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Says when steps must have ended, `(task, step, when)`; what was said before counts no more.
async fn set_deadlines(conn: &mut PgConnection, deadlines: &[(Uuid, Uuid, DateTime<Utc>)]) -> Result<(), store::Error> {
    let tasks: Vec<Uuid> = deadlines.iter().map(|(task, ..)| *task).collect();
    let steps: Vec<Uuid> = deadlines.iter().map(|(_, step, _)| *step).collect();
    let at: Vec<DateTime<Utc>> = deadlines.iter().map(|(.., at)| *at).collect();
    sqlx::query!(
        "insert into tasker.step_deadlines (task_uuid, step_uuid, at)
         select * from unnest($1::uuid[], $2::uuid[], $3::timestamptz[])
         on conflict (task_uuid, step_uuid) do update set at = excluded.at",
        &tasks,
        &steps,
        &at
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// What is due for tasks and steps that have ended.
#[derive(Debug, Default)]
struct Over {
    /// Tasks: everything but their retries.
    tasks: Vec<Uuid>,
    /// Steps of others, `(task, step)`: the same.
    steps: Vec<(Uuid, Uuid)>,
    /// Retries, `(task, due)`, which are found by their time.
    retries: Vec<(Uuid, DateTime<Utc>)>,
}

/// Forgets what nothing will come of.
async fn forget_due(conn: &mut PgConnection, over: &Over) -> Result<(), store::Error> {
    let (tasks, steps): (Vec<Uuid>, Vec<Uuid>) = over.steps.iter().copied().unzip();
    let (retrying, due): (Vec<Uuid>, Vec<DateTime<Utc>>) = over.retries.iter().copied().unzip();
    sqlx::query!(
        "with of_tasks as (
           delete from tasker.due d where d.task_uuid = any($1) and d.kind <> all ('{lease,retry,schedule}')
         ), of_steps as (
           delete from tasker.due d using unnest($2::uuid[], $3::uuid[]) s(task_uuid, step_uuid)
           where d.task_uuid = s.task_uuid and d.step_uuids = array[s.step_uuid] and d.kind <> all ('{lease,retry,schedule}')
         )
         delete from tasker.due d using unnest($4::uuid[], $5::timestamptz[]) r(task_uuid, due_at)
         where d.due_at = r.due_at and d.kind = 'retry' and d.task_uuid = r.task_uuid",
        &over.tasks,
        &tasks,
        &steps,
        &retrying,
        &due
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// When these steps, `(task, step)`, must have ended.
async fn deadlines(
    conn: &mut PgConnection,
    of: &[(Uuid, Uuid)],
) -> Result<Vec<(Uuid, Uuid, DateTime<Utc>)>, store::Error> {
    let (tasks, steps): (Vec<Uuid>, Vec<Uuid>) = of.iter().copied().unzip();
    let rows = sqlx::query!(
        "select d.task_uuid, d.step_uuid, d.at from unnest($1::uuid[], $2::uuid[]) w(task_uuid, step_uuid)
         join tasker.step_deadlines d on d.task_uuid = w.task_uuid and d.step_uuid = w.step_uuid",
        &tasks,
        &steps
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.task_uuid, row.step_uuid, row.at)).collect())
}

/// Forgets what was sent to tasks that have ended and never used it.
async fn forget_signals(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<(), store::Error> {
    sqlx::query!("delete from tasker.signals where task_uuid = any($1)", task_uuids).execute(conn).await?;
    Ok(())
}
