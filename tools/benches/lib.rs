//! A chain of steps and the log of its run, for benches: as rows would say it, without a database.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::json;
use tasker_shared::state_machine::plan::{Outcome, Step, Task};
use tasker_shared::state_machine::states::{Change, TaskMove};
use tasker_shared::state_machine::{Definition, Snapshot, StepEvent as E, StepState as S, TaskEvent, TaskState};
use tasker_shared::template;
use tasker_shared::trace::log::{Attempt, Head, StepInfo, TaskLog, Transition};
use uuid::Uuid;

/// A time to count from.
pub const BEGAN: DateTime<Utc> = DateTime::UNIX_EPOCH;

/// A template of `steps` steps, each behind the one before.
pub fn chain(steps: u32) -> Arc<Definition> {
    let mut yaml = String::from("namespace: bench\nname: chain\nversion: \"1\"\nsteps:\n");
    for index in 0..steps {
        let parent = index.checked_sub(1).map(|parent| format!("step_{parent}")).unwrap_or_default();
        let _ = writeln!(yaml, "  - {{name: step_{index}, handler: noop, depends_on: [{parent}]}}");
    }
    template::parse("chain.yaml", &yaml).expect("a chain is a template").compiled.definition
}

/// The task's row in this state, with so many steps open.
pub fn task(state: TaskState, open_steps: i32) -> Task {
    Task {
        uuid: Uuid::from_u128(1),
        state,
        version: 4,
        generation: 1,
        priority: 0,
        input: json!({"order": 1}),
        open_steps,
        in_flight_steps: i32::from(state == TaskState::StepsInProcess),
        retrying_steps: 0,
        held_steps: 0,
        failed_steps: 0,
        error_type: None,
        reason: None,
        ended_by: None,
        suspended_from: None,
        run_at: None,
        generation_began_at: BEGAN,
        last_at: BEGAN,
    }
}

/// What a settle loads when the first of five steps was reported.
pub fn first_of_five_reported(definition: &Arc<Definition>) -> Snapshot {
    let reported = Step {
        state: S::EnqueuedForOrchestration,
        version: 3,
        attempt: 1,
        claim_token: Some(Uuid::from_u128(3)),
        ..Step::new(Uuid::from_u128(10), 0, 1, 0, 0, BEGAN)
    };
    let behind = Step::new(Uuid::from_u128(11), 1, 1, 1, 0, BEGAN);
    Snapshot {
        outcomes: HashMap::from([(0, Outcome::Success(json!({"total": 12})))]),
        steps: HashMap::from([(0, reported), (1, behind)]),
        ..Snapshot::of_row(task(TaskState::StepsInProcess, 5), definition.clone())
    }
}

/// The log of a chain of so many steps that ran once each, from its start to its end.
pub fn log(steps: u32) -> TaskLog {
    let task = Uuid::from_u128(1);
    let mut log = TaskLog {
        head: Head {
            task_uuid: task,
            namespace: "bench".into(),
            task_name: "chain".into(),
            template_version: "1".into(),
            correlation_id: "ORDER-4711".into(),
            parent_correlation_id: None,
            parent_task_uuid: None,
            priority: 0,
            generation: 1,
            generation_began_at: BEGAN,
            created_at: BEGAN,
            trace_id: [7; 16],
            remote_span_id: None,
            root_link: None,
            trace_flags: 1,
            tracestate: None,
        },
        transitions: Vec::new(),
        attempts: Vec::new(),
        steps: HashMap::new(),
    };
    let mut clock = BEGAN;
    let mut tick = || {
        clock += TimeDelta::milliseconds(1);
        clock
    };
    let mut version = 0;
    let mut move_task = |log: &mut TaskLog, made: TaskMove, at| {
        version += 1;
        log.transitions.push(moved(task, version, Change::Task(made), at));
        version
    };
    let began = tick();
    move_task(&mut log, (TaskState::Pending, TaskEvent::Start, TaskState::Initializing), began);
    let mut sender =
        move_task(&mut log, (TaskState::Initializing, TaskEvent::ReadyStepsFound, TaskState::EnqueuingSteps), began);
    move_task(&mut log, (TaskState::EnqueuingSteps, TaskEvent::StepsEnqueued, TaskState::StepsInProcess), began);
    let mut enqueued = began;
    for index in 0..steps {
        let step = Uuid::from_u128(100 + u128::from(index));
        log.steps.insert(
            step,
            StepInfo {
                index,
                item: None,
                name: format!("step_{index}").into(),
                handler: "noop".into(),
                queue: "worker_bench".into(),
                max_attempts: 3,
            },
        );
        let (claimed, reported, settled) = (tick(), tick(), tick());
        let moves = [
            ((S::Pending, E::Enqueue, S::Enqueued), enqueued),
            ((S::Enqueued, E::Claim, S::InProgress), claimed),
            ((S::InProgress, E::Report, S::EnqueuedForOrchestration), reported),
            ((S::EnqueuedForOrchestration, E::Complete, S::Complete), settled),
        ];
        for (version, (made, at)) in (1..).zip(moves) {
            let made = Change::Step(made);
            let task_version = (version == 1).then_some(sender + 1);
            log.transitions.push(Transition { attempt: Some(1), task_version, ..moved(step, version, made, at) });
        }
        log.attempts.push(attempt(step, i64::from(index), (claimed, reported)));
        move_task(
            &mut log,
            (TaskState::StepsInProcess, TaskEvent::StepCompleted, TaskState::EvaluatingResults),
            settled,
        );
        if index + 1 < steps {
            sender = move_task(
                &mut log,
                (TaskState::EvaluatingResults, TaskEvent::ReadyStepsFound, TaskState::EnqueuingSteps),
                settled,
            );
            move_task(
                &mut log,
                (TaskState::EnqueuingSteps, TaskEvent::StepsEnqueued, TaskState::StepsInProcess),
                settled,
            );
            enqueued = settled;
        } else {
            move_task(
                &mut log,
                (TaskState::EvaluatingResults, TaskEvent::AllStepsSuccessful, TaskState::Complete),
                settled,
            );
        }
    }
    log
}

fn attempt(step: Uuid, message: i64, (claimed, reported): (DateTime<Utc>, DateTime<Utc>)) -> Attempt {
    Attempt {
        step,
        attempt: 1,
        worker: "worker-1".into(),
        worker_version: Some("1".into()),
        message_id: Some(message),
        result_message_id: Some(message),
        claim_began_at: claimed,
        claimed_at: claimed,
        report_began_at: Some(reported),
        reported_at: Some(reported),
        start_offset_ms: Some(0.1),
        run_ms: Some(0.2),
        failure: None,
        usage: None,
        milestones: None,
    }
}

fn moved(entity: Uuid, version: i32, change: Change, at: DateTime<Utc>) -> Transition {
    Transition {
        entity,
        version,
        task_version: None,
        generation: 1,
        attempt: None,
        change,
        actor: None,
        began_at: at,
        at,
        detail: None,
    }
}
