//! `spans(log) -> TaskSpans`: a task's trace is a pure function of its committed rows.
//!
//! The export, the recovery, the CLI and the tests all call this one function, so that two
//! views of a task can never disagree. It reads no clock and draws no random number.

mod ending;

use std::collections::HashMap;

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use serde_json::Value as Json;
use uuid::Uuid;

use self::ending::{Ending, is, opens, task_outcome};
pub use self::ending::{closes, outcome};
use super::context::Traceparent;
use super::ids::{SpanKey, span_id};
use super::log::{Attempt, Head, StepInfo, TaskLog, Transition};
use super::names;
use super::span::{Event, Kind, Link, Service, Span, SpanId, TaskSpans, Value};
use crate::state_machine::plan::Wait;
use crate::state_machine::states::{StepEvent, StepState, TaskEvent, TaskState};

/// The most links one result.evaluation carries; the rest is counted in `links_omitted`.
pub const MAX_LINKS: usize = 128;
/// The most events that a handler's span takes from its report, which may be of a worker in any language.
const MAX_EVENTS: usize = 256;

/// The spans of everything that has ended.
pub fn spans(log: &TaskLog) -> TaskSpans {
    Tree::new(log, None).build()
}

/// The same spans, at most `size` at a time, in the order of [`spans`]: those of a large task are
/// never all in memory.
pub fn in_parts(log: &TaskLog, size: usize) -> impl Iterator<Item = TaskSpans> + Send {
    let mut tree = Tree::new(log, None);
    tree.spans = Vec::new();
    let (task_rows, step_rows) = tree.sorted();
    tree.roots(&task_rows);
    let (mut task_rows, mut done) = (task_rows.into_iter(), 0);
    std::iter::from_fn(move || {
        while tree.spans.len() < size {
            if let Some(row) = task_rows.next() {
                tree.task_move(row);
            } else if let Some(rows) = step_rows[done..].chunk_by(|a, b| a.entity == b.entity).next() {
                done += rows.len();
                tree.step(rows);
            } else {
                break;
            }
        }
        let rest = tree.spans.split_off(size.min(tree.spans.len()));
        let part = std::mem::replace(&mut tree.spans, rest);
        (!part.is_empty()).then(|| tree.whole(part))
    })
}

/// The same, and what is still open, drawn as if it ended now and marked `in_progress`:
/// for people to look at, never for export.
pub fn spans_so_far(log: &TaskLog, now: DateTime<Utc>) -> TaskSpans {
    Tree::new(log, Some(now)).build()
}

struct Tree<'a> {
    log: &'a TaskLog,
    now: Option<DateTime<Utc>>,
    attempts: HashMap<(Uuid, i32), &'a Attempt>,
    /// Step moves by the time of their transaction: all moves of one share it.
    settled: HashMap<DateTime<Utc>, Vec<&'a Transition>>,
    spans: Vec<Span>,
}

impl<'a> Tree<'a> {
    fn new(log: &'a TaskLog, now: Option<DateTime<Utc>>) -> Self {
        let mut settled: HashMap<_, Vec<_>> = HashMap::new();
        for row in log.transitions.iter().filter(|row| row.of_step().is_some()) {
            settled.entry(row.at).or_default().push(row);
        }
        for rows in settled.values_mut() {
            rows.sort_unstable_by_key(|row| (row.entity, row.version));
        }
        Self {
            log,
            now,
            attempts: log.attempts.iter().map(|attempt| ((attempt.step, attempt.attempt), attempt)).collect(),
            settled,
            spans: Vec::with_capacity(log.transitions.len() * 2),
        }
    }

    fn build(mut self) -> TaskSpans {
        let (task_rows, step_rows) = self.sorted();
        self.roots(&task_rows);
        for row in task_rows {
            self.task_move(row);
        }
        for rows in step_rows.chunk_by(|a, b| a.entity == b.entity) {
            self.step(rows);
        }
        let spans = std::mem::take(&mut self.spans);
        self.whole(spans)
    }

    /// The rows of the task, and those of its steps.
    fn sorted(&self) -> (Vec<&'a Transition>, Vec<&'a Transition>) {
        let (mut task_rows, mut step_rows): (Vec<_>, Vec<_>) =
            self.log.transitions.iter().partition(|row| row.of_task().is_some());
        task_rows.sort_unstable_by_key(|row| row.version);
        step_rows.sort_unstable_by_key(|row| (row.entity, row.version));
        (task_rows, step_rows)
    }

    fn whole(&self, spans: Vec<Span>) -> TaskSpans {
        let head = &self.log.head;
        TaskSpans {
            trace_id: head.trace_id,
            trace_flags: head.trace_flags,
            tracestate: head.tracestate.clone(),
            common: vec![
                (names::CORRELATION_ID, head.correlation_id.clone().into()),
                (names::TASK_UUID, head.task_uuid.to_string().into()),
                (names::NAMESPACE, head.namespace.to_string().into()),
            ],
            spans,
        }
    }

    // The task.

    /// One task.orchestration per generation that has ended.
    fn roots(&mut self, task_rows: &[&'a Transition]) {
        for row in task_rows {
            let Some((outcome, failed)) = row.of_task().and_then(|(_, event, to)| task_outcome(event, to)) else {
                continue;
            };
            let start = self.generation_began(row.generation, task_rows);
            let mut root = self.root(row.generation, start, row.at);
            root.attributes.push((names::OUTCOME, outcome.into()));
            let detail = row.detail.as_ref();
            if failed {
                let kind = detail.and_then(|d| d.error_type.clone()).unwrap_or_else(|| "error".into());
                let message = detail.and_then(|d| d.reason.clone()).unwrap_or_else(|| "the task failed".into());
                fail(&mut root, kind, message, row.at);
            } else if let Some(reason) = detail.and_then(|d| d.reason.clone()) {
                root.attributes.push((names::REASON, reason.into()));
            }
            self.spans.push(root);
        }
        let ended = task_rows.last().and_then(|row| row.of_task()).is_some_and(|(.., to)| to.is_terminal());
        if let Some(now) = self.now.filter(|_| !ended) {
            let generation = self.log.head.generation;
            let mut root = self.root(generation, self.generation_began(generation, task_rows), now);
            root.attributes.push((names::IN_PROGRESS, true.into()));
            self.spans.push(root);
        }
    }

    fn generation_began(&self, generation: i32, task_rows: &[&Transition]) -> DateTime<Utc> {
        // Only from a terminal state: the repair of a blocked task stays within its generation.
        let begins = |row: &&&Transition| {
            let of = row.of_task().filter(|_| row.generation == generation);
            of.is_some_and(|(from, event, _)| {
                matches!(event, TaskEvent::OperatorRetry | TaskEvent::Rerun) && from.is_terminal()
            })
        };
        if generation == 1 {
            self.log.head.created_at
        } else {
            task_rows.iter().find(begins).map_or(self.log.head.generation_began_at, |row| row.began_at)
        }
    }

    fn root(&self, generation: i32, start: DateTime<Utc>, end: DateTime<Utc>) -> Span {
        let head = &self.log.head;
        let mut attributes: Vec<(&'static str, Value)> = vec![
            (names::TASK_NAME, head.task_name.to_string().into()),
            (names::TEMPLATE_VERSION, head.template_version.to_string().into()),
            (names::PRIORITY, i64::from(head.priority).into()),
            (names::GENERATION, i64::from(generation).into()),
        ];
        if let Some(parent) = &head.parent_correlation_id {
            attributes.push((names::PARENT_CORRELATION_ID, parent.clone().into()));
        }
        if let Some(parent) = head.parent_task_uuid {
            attributes.push((names::PARENT_TASK_UUID, parent.to_string().into()));
        }
        let before = (generation > 1).then(|| self.link(root_id(head, generation - 1)));
        let linked = head.root_link.as_deref().filter(|_| generation == 1).and_then(link_to);
        // What awaited a nested task ended before an operator began its next generation.
        let parent = head.remote_span_id.filter(|_| generation == 1 || head.parent_task_uuid.is_none());
        Span {
            parent,
            parent_is_remote: parent.is_some(),
            attributes,
            links: before.into_iter().chain(linked).collect(),
            ..span(names::TASK_ORCHESTRATION, root_id(head, generation), None, start, end)
        }
    }

    fn task_move(&mut self, row: &'a Transition) {
        let Some((from, _, to)) = row.of_task() else {
            return;
        };
        let head = &self.log.head;
        let root = root_id(head, row.generation);
        let mut moved = span(
            names::TASK_STATE_TRANSITION,
            self.of_task(SpanKey::TaskTransition, row),
            Some(root),
            row.began_at,
            row.at,
        );
        moved.attributes = moved_attributes(row, None);
        if to == TaskState::Error {
            let detail = row.detail.as_ref();
            let kind = detail.and_then(|d| d.error_type.clone()).unwrap_or_else(|| "error".into());
            fail(&mut moved, kind, detail.and_then(|d| d.reason.clone()).unwrap_or_default(), row.at);
        }
        let parent = moved.id;
        self.spans.push(moved);

        let rows = self.settled.get(&row.at).map_or(&[][..], Vec::as_slice);
        let enqueued = || rows.iter().filter(|row| matches!(row.of_step(), Some((.., StepState::Enqueued))));
        let child = |name, key| span(name, self.of_task(key, row), Some(parent), row.began_at, row.at);
        let made = match (from, to) {
            (TaskState::Initializing | TaskState::EvaluatingResults, TaskState::EnqueuingSteps) => {
                let mut found = child(names::STEP_DISCOVERY, SpanKey::Discovery);
                found.attributes.push((names::READY_STEPS, count(enqueued().count())));
                found
            }
            (TaskState::EnqueuingSteps, TaskState::StepsInProcess) => {
                let mut sent = child(names::STEP_ENQUEUING, SpanKey::Enqueuing);
                sent.kind = Kind::Producer;
                sent.attributes.push((names::MESSAGING_SYSTEM, "pgmq".into()));
                sent.attributes.push((names::MESSAGING_OPERATION, "send".into()));
                sent.attributes.push((names::MESSAGING_BATCH_COUNT, count(enqueued().count())));
                let mut queues = enqueued().filter_map(|step| Some(&self.log.steps.get(&step.entity)?.queue));
                if let Some(first) = queues.next().filter(|first| queues.all(|other| other == *first)) {
                    sent.attributes.push((names::MESSAGING_DESTINATION, first.to_string().into()));
                }
                sent
            }
            (TaskState::StepsInProcess, TaskState::EvaluatingResults) => {
                let mut evaluated = child(names::RESULT_EVALUATION, SpanKey::Evaluation);
                // A report that the end of the task cancelled in the same settle was never looked at.
                let reported = rows.iter().filter(|row| {
                    row.of_step().is_some_and(|(from, event, _)| {
                        let reported =
                            [StepState::EnqueuedForOrchestration, StepState::EnqueuedAsErrorForOrchestration];
                        reported.contains(&from) && event != StepEvent::Cancel
                    })
                });
                let links: Vec<Link> = reported
                    .map(|step| self.link(self.of_attempt(SpanKey::Submission, step.entity, step.attempt.unwrap_or(0))))
                    .collect();
                evaluated.attributes.push((names::RESULTS, count(links.len())));
                if links.len() > MAX_LINKS {
                    evaluated.attributes.push((names::LINKS_OMITTED, count(links.len() - MAX_LINKS)));
                }
                evaluated.links = links.into_iter().take(MAX_LINKS).collect();
                evaluated
            }
            // Every other move is a span of its own, and no part of the work is behind it.
            _ => return,
        };
        self.spans.push(made);
    }

    // The steps.

    fn step(&mut self, rows: &[&'a Transition]) {
        let entity = rows[0].entity;
        let Some(info) = self.log.steps.get(&entity) else {
            return;
        };
        let mut open: Option<(i32, Vec<&'a Transition>)> = None;
        for &row in rows {
            self.waits(row);
            match &mut open {
                Some((_, moves)) => moves.push(row),
                None if opens(row).is_none() => self.loose_step_move(row),
                None => {}
            }
            if row.of_step().is_some_and(|(_, event, to)| closes(event, to))
                && let Some((attempt, moves)) = open.take()
            {
                self.attempt(info, attempt, &moves, Some(row));
            }
            if let Some(attempt) = opens(row) {
                // A lost attempt's last move is also the Enqueue of the next.
                open = Some((attempt, vec![row]));
            }
        }
        if let (Some((attempt, moves)), Some(_)) = (open, self.now) {
            self.attempt(info, attempt, &moves, None);
        }
    }

    /// Waits that the row says it ended; waiting in a queue belongs to the attempt instead.
    fn waits(&mut self, row: &Transition) {
        for Wait { reason, since, until, ended, ordinal, actor, link } in
            row.detail.iter().flat_map(|detail| &detail.waits)
        {
            let id = self.of_step(SpanKey::Wait, row.entity, *ordinal);
            let root = root_id(&self.log.head, row.generation);
            let mut waited = span(names::STEP_WAIT, id, Some(root), *since, ended.unwrap_or(row.began_at));
            waited.settled_at = row.at;
            waited.attributes.push((names::STEP_UUID, row.entity.to_string().into()));
            waited.attributes.push((names::WAIT_REASON, reason.clone().into()));
            if let Some(until) = until {
                waited.attributes.push((names::WAIT_UNTIL, time(*until)));
            }
            if let Some(actor) = actor {
                waited.attributes.push((names::ACTOR, actor.clone().into()));
            }
            waited.links.extend(link.as_deref().and_then(link_to));
            self.spans.push(waited);
        }
    }

    /// A move with no open attempt: skipped, cancelled, resolved, retried by an operator.
    fn loose_step_move(&mut self, row: &Transition) {
        let root = root_id(&self.log.head, row.generation);
        let moved = self.step_move(row, root);
        self.spans.push(moved);
    }

    fn step_move(&self, row: &Transition, parent: SpanId) -> Span {
        let id = self.of_step(SpanKey::StepTransition, row.entity, row.version);
        let mut moved = span(names::STEP_STATE_TRANSITION, id, Some(parent), row.began_at, row.at);
        moved.attributes = moved_attributes(row, Some(row.entity));
        if matches!(row.of_step(), Some((.., StepState::Error))) {
            let detail = row.detail.as_ref();
            let kind = detail.and_then(|d| d.error_type.clone()).unwrap_or_else(|| "error".into());
            fail(&mut moved, kind, detail.and_then(|d| d.reason.clone()).unwrap_or_default(), row.at);
        }
        moved
    }

    /// One attempt: from its Enqueue to the move that closed it (`None`: it is still open).
    fn attempt(&mut self, info: &StepInfo, number: i32, moves: &[&'a Transition], closing: Option<&'a Transition>) {
        let (Some(opening), Some(now)) = (moves.first(), closing.map(|row| row.at).or(self.now)) else {
            return;
        };
        let entity = opening.entity;
        let end = now.max(opening.at);
        let attempt = self.attempts.get(&(entity, number)).copied();
        let ending = closing.and_then(|row| Ending::of(row, attempt));
        let outcome = ending.as_ref().map_or("", |ending| ending.outcome);

        let root = root_id(&self.log.head, opening.generation);
        let id = self.of_attempt(SpanKey::StepExecution, entity, number);
        let mut execution = span(names::STEP_EXECUTION, id, Some(root), opening.began_at, end);
        if let Some(version) = opening.task_version {
            let head = &self.log.head;
            execution.links.push(self.link(span_id(
                &head.trace_id,
                head.task_uuid,
                0,
                0,
                SpanKey::Enqueuing,
                unsigned(version),
            )));
        }
        if number > 1 {
            execution.links.push(self.link(self.of_attempt(SpanKey::StepExecution, entity, number - 1)));
        }
        execution.attributes = vec![
            (names::STEP_UUID, entity.to_string().into()),
            (names::STEP_NAME, info.name.to_string().into()),
            (names::ATTEMPT_NUMBER, i64::from(number).into()),
            (names::MAX_ATTEMPTS, i64::from(info.max_attempts).into()),
        ];
        // The attempt of a step that starts a task has none.
        if !info.handler.is_empty() {
            execution.attributes.push((names::HANDLER_NAME, info.handler.to_string().into()));
        }
        if let Some(item) = info.item {
            execution.attributes.push((names::STEP_INDEX, i64::from(item).into()));
        }
        match &ending {
            Some(ending) => {
                execution.attributes.push((names::OUTCOME, outcome.into()));
                if let Some((kind, message)) = &ending.error {
                    fail(&mut execution, kind.clone(), message.clone(), end);
                }
            }
            None => execution.attributes.push((names::IN_PROGRESS, true.into())),
        }
        let first = self.spans.len();
        self.spans.push(execution);

        // A lost attempt's closing move opened the next one too: it is this attempt's span.
        let own = if opens(opening).is_some() && opening.attempt != Some(number) { &moves[1..] } else { moves };
        for row in own {
            let step_span = self.step_move(row, id);
            self.spans.push(step_span);
        }

        let claim = moves.iter().find(|row| is(row, StepEvent::Claim));
        let wait_id =
            span_id(&self.log.head.trace_id, entity, 0, unsigned(number), SpanKey::Wait, unsigned(opening.version));
        let mut waited = span(names::STEP_WAIT, wait_id, Some(id), opening.at, claim.map_or(end, |row| row.at));
        waited.attributes.push((names::STEP_UUID, entity.to_string().into()));
        waited.attributes.push((names::WAIT_REASON, "queue".into()));
        if matches!(opening.of_step(), Some((.., StepState::Enqueued))) {
            self.spans.push(waited);
        }

        if let (Some(claim), Some(attempt)) = (claim, attempt) {
            let report = moves.iter().find(|row| is(row, StepEvent::Report)).copied();
            self.handler(info, number, id, attempt, claim, report, ending.as_ref(), end);
            if let Some(report) = report {
                self.submission(number, id, attempt, report);
            }
        }
        // Everything of an attempt goes out with the settle that closes it, inside its times.
        let (start, settled_at) = (opening.began_at.min(end), end);
        for inner in &mut self.spans[first..] {
            inner.start = inner.start.clamp(start, end);
            inner.end = inner.end.clamp(inner.start, end);
            inner.settled_at = settled_at;
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the rows of one attempt, each by its name")]
    fn handler(
        &mut self,
        info: &StepInfo,
        number: i32,
        parent: SpanId,
        attempt: &Attempt,
        claim: &Transition,
        report: Option<&Transition>,
        ending: Option<&Ending>,
        end: DateTime<Utc>,
    ) {
        let id = self.of_attempt(SpanKey::Handler, claim.entity, number);
        // Before a report nothing is known but that the attempt was claimed.
        let (start, stop) = match report {
            Some(report) => {
                let start = (claim.at + milliseconds(attempt.start_offset_ms)).min(report.at);
                (start, (start + milliseconds(attempt.run_ms)).min(report.at))
            }
            None => (claim.at, end),
        };
        let mut ran = span(names::HANDLER_EXECUTION, id, Some(parent), start, stop);
        ran.kind = Kind::Consumer;
        ran.service = Service::Worker;
        ran.attributes = vec![
            (names::HANDLER_NAME, info.handler.to_string().into()),
            (names::ATTEMPT_NUMBER, i64::from(number).into()),
            (names::WORKER, attempt.worker.clone().into()),
            (names::MESSAGING_OPERATION, "process".into()),
        ];
        if let Some(version) = &attempt.worker_version {
            ran.attributes.push((names::WORKER_VERSION, version.clone().into()));
        }
        if let Some(message) = attempt.message_id {
            ran.attributes.push((names::MESSAGING_MESSAGE_ID, message.to_string().into()));
        }
        if let Some(beat) = ending.and_then(|ending| ending.last_heartbeat_at) {
            ran.attributes.push((names::LAST_HEARTBEAT_AT, time(beat)));
        }
        add_reported(&mut ran, attempt, claim.at);
        if let Some(failure) = &attempt.failure {
            fail(&mut ran, failure.kind.clone(), failure.message.clone(), stop);
        } else if let Some((kind, message)) =
            ending.filter(|_| report.is_none()).and_then(|ending| ending.error.as_ref())
        {
            fail(&mut ran, kind.clone(), message.clone(), stop);
        } else if ending.is_none() && report.is_none() {
            ran.attributes.push((names::IN_PROGRESS, true.into()));
        }
        self.spans.push(ran);
    }

    fn submission(&mut self, number: i32, parent: SpanId, attempt: &Attempt, report: &Transition) {
        let id = self.of_attempt(SpanKey::Submission, report.entity, number);
        let mut sent = span(names::RESULT_SUBMISSION, id, Some(parent), report.began_at, report.at);
        sent.kind = Kind::Producer;
        sent.service = Service::Worker;
        sent.attributes.push((names::MESSAGING_DESTINATION, "step_results".into()));
        if let Some(message) = attempt.result_message_id {
            sent.attributes.push((names::MESSAGING_MESSAGE_ID, message.to_string().into()));
        }
        self.spans.push(sent);
    }

    // Ids.

    fn of_task(&self, key: SpanKey, row: &Transition) -> SpanId {
        span_id(&self.log.head.trace_id, self.log.head.task_uuid, 0, 0, key, unsigned(row.version))
    }

    fn of_step(&self, key: SpanKey, step: Uuid, version: i32) -> SpanId {
        span_id(&self.log.head.trace_id, step, 0, 0, key, unsigned(version))
    }

    fn of_attempt(&self, key: SpanKey, step: Uuid, attempt: i32) -> SpanId {
        span_id(&self.log.head.trace_id, step, 0, unsigned(attempt), key, 0)
    }

    fn link(&self, span_id: SpanId) -> Link {
        Link { trace_id: self.log.head.trace_id, span_id }
    }
}

fn link_to(traceparent: &str) -> Option<Link> {
    let to: Traceparent = traceparent.parse().ok()?;
    Some(Link { trace_id: to.trace_id, span_id: to.span_id })
}

/// The id of a generation's task.orchestration.
pub fn root_id(head: &Head, generation: i32) -> SpanId {
    span_id(&head.trace_id, head.task_uuid, unsigned(generation), 0, SpanKey::Root, 0)
}

fn span(name: &'static str, id: SpanId, parent: Option<SpanId>, start: DateTime<Utc>, end: DateTime<Utc>) -> Span {
    Span {
        id,
        parent,
        parent_is_remote: false,
        name,
        kind: Kind::Internal,
        service: Service::Orchestration,
        start,
        end: end.max(start),
        attributes: Vec::new(),
        links: Vec::new(),
        events: Vec::new(),
        error: None,
        settled_at: end,
    }
}

fn moved_attributes(row: &Transition, step: Option<Uuid>) -> Vec<(&'static str, Value)> {
    let mut attributes = Vec::with_capacity(5);
    if let Some(step) = step {
        attributes.push((names::STEP_UUID, step.to_string().into()));
    }
    attributes.push((names::FROM_STATE, row.change.from().into()));
    attributes.push((names::TO_STATE, row.change.to().into()));
    attributes.push((names::EVENT, row.change.event().into()));
    if let Some(actor) = &row.actor {
        attributes.push((names::ACTOR, actor.clone().into()));
    }
    attributes
}

fn fail(span: &mut Span, kind: String, message: String, at: DateTime<Utc>) {
    span.attributes.push((names::ERROR_TYPE, kind.clone().into()));
    span.events.push(Event {
        name: names::EXCEPTION.into(),
        at,
        attributes: vec![
            (names::EXCEPTION_TYPE.into(), kind.clone().into()),
            (names::EXCEPTION_MESSAGE.into(), message.clone().into()),
        ],
    });
    span.error = Some(if message.is_empty() { kind } else { message });
}

/// What the handler reported: its milestones as events, its usage as attributes.
fn add_reported(span: &mut Span, attempt: &Attempt, claimed_at: DateTime<Utc>) {
    for milestone in attempt.milestones.iter().filter_map(Json::as_array).flatten().take(MAX_EVENTS) {
        let Some(name) = milestone.get("name").and_then(Json::as_str) else {
            continue;
        };
        let at =
            milestone.get("at_ms").and_then(Json::as_f64).map_or(span.end, |ms| claimed_at + milliseconds(Some(ms)));
        let attributes = milestone.get("attributes").and_then(Json::as_object).into_iter().flatten();
        span.events.push(Event {
            name: name.to_owned().into(),
            at: at.clamp(span.start, span.end),
            attributes: attributes.filter_map(|(key, value)| Some((key.clone().into(), plain(value)?))).collect(),
        });
    }
    let mut others = Vec::new();
    for (name, amount) in attempt.usage.iter().filter_map(Json::as_object).flatten() {
        let Some(amount) = plain(amount) else {
            continue;
        };
        match name.as_str() {
            names::INPUT_TOKENS => span.attributes.push((names::INPUT_TOKENS, amount)),
            names::OUTPUT_TOKENS => span.attributes.push((names::OUTPUT_TOKENS, amount)),
            _ => others.push((name.clone().into(), amount)),
        }
    }
    if !others.is_empty() {
        span.events.push(Event { name: names::USAGE.into(), at: span.end, attributes: others });
    }
    span.events.sort_by_key(|event| event.at);
}

/// A value as an attribute has it; lists and objects as JSON text.
fn plain(value: &Json) -> Option<Value> {
    Some(match value {
        Json::Null => return None,
        Json::Bool(value) => Value::Bool(*value),
        Json::Number(number) => match number.as_i64() {
            Some(whole) => Value::Int(whole),
            None => Value::Float(number.as_f64()?),
        },
        Json::String(text) => text.clone().into(),
        other => other.to_string().into(),
    })
}

fn count(n: usize) -> Value {
    Value::Int(i64::try_from(n).unwrap_or(i64::MAX))
}

fn unsigned(n: i32) -> u64 {
    u64::from(n.unsigned_abs())
}

fn time(at: DateTime<Utc>) -> Value {
    at.to_rfc3339_opts(SecondsFormat::Micros, true).into()
}

fn milliseconds(ms: Option<f64>) -> TimeDelta {
    // A worker's clock is not to be trusted beyond a year.
    let micros = (ms.unwrap_or(0.0) * 1000.0).clamp(0.0, 3.2e13);
    #[expect(clippy::cast_possible_truncation, reason = "clamped on the line above")]
    TimeDelta::microseconds(micros as i64)
}
