//! The YAML tree -> a checked definition, with every problem found on the way.

mod together;
mod values;

use std::fmt::Display;
use std::time::Duration;

use self::values::shown;
use super::duration::format_duration;
use super::schema::InputSchema;
use super::yaml::{self, Entry, Kind, Node, Place};
use super::{
    Checked, ChildTask, Concurrency, Incoming, Join, Keep, MAX_DEFINITION_BYTES, MAX_DEPTH, MAX_FILE_BYTES,
    MAX_PARALLEL, MAX_STEPS, OnExhausted, OnFailure, OnItemFailure, OnTimeout, Problem, Rate, RetryPolicy, SignalWait,
    StepDefinition, StepTimeouts, TaskTimeouts, Template, Trace, WaitFor, key_template,
};
use crate::state_machine::definition::MAX_ITEMS;
use crate::state_machine::graph::GraphError;
use crate::state_machine::input::{Path, Segment};

/// The keys of each mapping, as `docs/templates.md` lists them.
pub(super) const TEMPLATE_KEYS: [&str; 12] = [
    "namespace",
    "name",
    "version",
    "description",
    "input_schema",
    "on_failure",
    "timeouts",
    "trace",
    "concurrency",
    "rate",
    "fair_key",
    "steps",
];
pub(super) const CONCURRENCY_KEYS: [&str; 2] = ["key", "limit"];
pub(super) const RATE_KEYS: [&str; 3] = ["key", "limit", "per"];
pub(super) const TASK_TIMEOUT_KEYS: [&str; 1] = ["total"];
pub(super) const TRACE_KEYS: [&str; 2] = ["incoming", "keep"];
pub(super) const STEP_KEYS: [&str; 18] = [
    "name",
    "handler",
    "wait",
    "task",
    "depends_on",
    "join",
    "when",
    "branches",
    "for_each",
    "max_parallel",
    "on_item_failure",
    "input",
    "queue",
    "priority",
    "concurrency",
    "rate",
    "retry",
    "timeouts",
];
pub(super) const WAIT_KEYS: [&str; 6] = ["sleep", "until", "signal", "allowed", "timeout", "on_timeout"];
pub(super) const TASK_KEYS: [&str; 4] = ["template", "version", "namespace", "await"];
pub(super) const RETRY_KEYS: [&str; 7] = [
    "max_attempts",
    "initial_interval",
    "backoff_coefficient",
    "max_interval",
    "jitter",
    "non_retryable_errors",
    "on_exhausted",
];
pub(super) const STEP_TIMEOUT_KEYS: [&str; 4] = ["queue", "run", "total", "heartbeat"];

const MAX_PROBLEMS: usize = 100;
/// Comparing a misspelt step name with 20,000 others takes its time, so only
/// the first few problems of a file come with a suggestion.
const MAX_SUGGESTIONS: usize = 10;
const MAX_NAMESPACE_BYTES: usize = 40;
/// `worker_`, both parts and `__` must fit PGMQ's 47 bytes of a queue name.
const MAX_NAMESPACE_AND_QUEUE_BYTES: usize = 38;
const MAX_HANDLER_BYTES: usize = 100;
const MAX_VERSION_CHARS: usize = 64;
const MAX_DESCRIPTION_CHARS: usize = 1000;
const MAX_ERROR_TYPES: usize = 100;
const MAX_ANSWERS: usize = 100;
const MAX_ANSWER_CHARS: usize = 100;
const MAX_ERROR_TYPE_CHARS: usize = 100;
const MAX_ATTEMPTS: u32 = 1_000_000;
const MAX_LIMIT: i32 = 1_000_000;
const MAX_COEFFICIENT: f64 = 1000.0;
const SHORTEST_HEARTBEAT: Duration = Duration::from_secs(1);

pub(super) fn read(file: &str, text: &str) -> Result<Checked, Vec<Problem>> {
    let mut read = Read { file, problems: Vec::new() };
    let start = Place { line: 1, column: 1 };
    if text.len() > MAX_FILE_BYTES {
        let message =
            format!("the file has {} bytes, more than {MAX_FILE_BYTES}; move data into the tasks' inputs", text.len());
        return Err(read.only(start, message));
    }
    let root = match yaml::read(text) {
        Ok(root) => root,
        Err((place, message)) => {
            return Err(read.only(place, format!("cannot be read as YAML: {message}")));
        }
    };
    if matches!(root.kind, Kind::Null) {
        return Err(read.only(start, "the file is empty; a template starts with `namespace:`"));
    }
    let checked = read.template(&root);
    read.problems.sort_by_key(|problem| (problem.line, problem.column));
    match checked {
        Some(checked) if read.problems.is_empty() => Ok(checked),
        _ => Err(read.problems),
    }
}

/// The file being read, and what was found wrong with it so far.
struct Read<'a> {
    file: &'a str,
    problems: Vec<Problem>,
}

/// A mapping whose keys are known to be known.
struct Fields<'n> {
    place: Place,
    path: String,
    entries: &'n [Entry],
}

impl<'n> Fields<'n> {
    fn get(&self, key: &str) -> Option<&'n Node> {
        self.entries.iter().find(|entry| entry.key == key).map(|entry| &entry.value)
    }

    /// The path of a key of this mapping, from the file's root.
    fn path(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }
}

/// A step as read, with its node for places.
struct ReadStep<'n> {
    index: usize,
    definition: StepDefinition,
    node: &'n Node,
}

impl ReadStep<'_> {
    fn place(&self, path: &[Segment]) -> Place {
        self.node.place_of(path)
    }
}

fn key(key: &str) -> Segment {
    Segment::Key(key.to_owned())
}

impl Read<'_> {
    fn wrong(&mut self, place: Place, key: impl Display, message: impl Into<String>) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(Problem {
                file: self.file.to_owned(),
                line: place.line,
                column: place.column,
                key: key.to_string(),
                message: message.into(),
            });
        }
    }

    /// The problem that ends the reading.
    fn only(&mut self, place: Place, message: impl Into<String>) -> Vec<Problem> {
        self.wrong(place, "", message);
        std::mem::take(&mut self.problems)
    }

    // The whole template.

    fn template(&mut self, root: &Node) -> Option<Checked> {
        if let Some(place) = root.deeper_than(MAX_DEPTH) {
            let message = format!("lists and mappings nest deeper than {MAX_DEPTH} levels here");
            self.wrong(place, "", message);
            return None;
        }
        let fields = self.fields(root, "", &TEMPLATE_KEYS)?;
        let namespace = self.required(&fields, "namespace", Self::namespace);
        let name = self.required(&fields, "name", Self::name);
        let version = self.required(&fields, "version", Self::version);
        let description = self.optional(&fields, "description", Self::description);
        let input_schema = self.optional(&fields, "input_schema", Self::input_schema);
        let on_failure = self.optional(&fields, "on_failure", |read, node, path| {
            read.choice(node, path, &[("fail", OnFailure::Fail), ("block", OnFailure::Block)])
        });
        let timeouts = self.optional(&fields, "timeouts", Self::task_timeouts);
        let trace = self.optional(&fields, "trace", Self::trace);
        let concurrency = self.optional(&fields, "concurrency", Self::concurrency);
        let rate = self.optional(&fields, "rate", Self::rate);
        let fair_key = self.optional(&fields, "fair_key", Self::limit_key);
        let steps = self.required(&fields, "steps", Self::steps)?;
        if let Some(namespace) = &namespace {
            self.queue_lengths(namespace, &steps);
        }
        let graph = self.graph(&steps, fields.get("steps"));
        self.references(&steps, graph.as_ref());
        if let Some(graph) = &graph {
            self.branches(&steps, graph);
        }
        self.conditions(&steps, input_schema.as_ref());
        self.maps(&steps, input_schema.as_ref());
        if let (Some(namespace), Some(name)) = (&namespace, &name) {
            self.nested(&steps, namespace, name);
        }

        let template = Template {
            namespace: namespace?,
            name: name?,
            version: version?,
            description: description.unwrap_or_default(),
            input_schema,
            on_failure: on_failure.unwrap_or_default(),
            timeouts: timeouts.unwrap_or_default(),
            trace: trace.unwrap_or_default(),
            concurrency,
            rate,
            fair_key,
            steps: steps.into_iter().map(|step| step.definition).collect(),
        };
        self.size(root.place, &template);
        Some(Checked { template, graph: graph? })
    }

    fn size(&mut self, place: Place, template: &Template) {
        let size = serde_json::to_vec(template).map_or(0, |json| json.len());
        if size > MAX_DEFINITION_BYTES {
            let message = format!(
                "the definition has {size} bytes as JSON, more than {MAX_DEFINITION_BYTES}; \
                 shorten names and inputs, or split the work into several tasks"
            );
            self.wrong(place, "", message);
        }
    }

    // One function for each kind of value of the template.

    fn namespace(&mut self, node: &Node, path: &str) -> Option<String> {
        self.text_like(
            node,
            path,
            is_queue_part,
            &format!(
                "may hold only a-z, 0-9 and single _ between them, start with a letter, and have at \
             most {MAX_NAMESPACE_BYTES} characters"
            ),
        )
    }

    fn name(&mut self, node: &Node, path: &str) -> Option<String> {
        self.text_like(
            node,
            path,
            is_name,
            "may hold only a-z, 0-9 and _, start with a letter, and have at most 40 characters",
        )
    }

    fn handler(&mut self, node: &Node, path: &str) -> Option<String> {
        self.text_like(
            node,
            path,
            is_handler,
            &format!(
                "may hold only a-z, 0-9 and _ in parts separated by dots, start with a letter, and \
             have at most {MAX_HANDLER_BYTES} characters"
            ),
        )
    }

    fn version(&mut self, node: &Node, path: &str) -> Option<String> {
        if let Kind::Number(_) = &node.kind {
            let message = "is a number, in which 1.10 and 1.1 are the same; put it in quotes";
            self.wrong(node.place, path, message);
            return None;
        }
        self.text_like(
            node,
            path,
            is_version,
            &format!(
                "must have 1 to {MAX_VERSION_CHARS} printable ASCII characters without spaces, such \
             as \"1.2.0\""
            ),
        )
    }

    fn description(&mut self, node: &Node, path: &str) -> Option<String> {
        let fits = |text: &str| text.chars().count() <= MAX_DESCRIPTION_CHARS;
        let message = format!("has more than {MAX_DESCRIPTION_CHARS} characters; one line is enough");
        self.text_where(node, path, fits, |_| message)
    }

    fn input_schema(&mut self, node: &Node, path: &str) -> Option<serde_json::Value> {
        let schema = node.to_value();
        match InputSchema::compile(&schema) {
            Ok(_) => Some(schema),
            Err(error) => {
                let inner = pointer_path(&error.pointer, node);
                self.wrong(node.place_of(&inner), format!("{path}{}", Path(&inner)), error.message);
                None
            }
        }
    }

    fn task_timeouts(&mut self, node: &Node, path: &str) -> Option<TaskTimeouts> {
        let fields = self.fields(node, path, &TASK_TIMEOUT_KEYS)?;
        Some(TaskTimeouts { total: self.optional(&fields, "total", Self::duration) })
    }

    fn trace(&mut self, node: &Node, path: &str) -> Option<Trace> {
        let fields = self.fields(node, path, &TRACE_KEYS)?;
        let incoming = self.optional(&fields, "incoming", |read, node, path| {
            read.choice(node, path, &[("join", Incoming::Join), ("link", Incoming::Link)])
        });
        let keep = self.optional(&fields, "keep", |read, node, path| read.list(node, path, Self::keep));
        Some(Trace { incoming: incoming.unwrap_or_default(), keep: keep.unwrap_or_default() })
    }

    fn keep(&mut self, node: &Node, path: &str) -> Option<Keep> {
        if let Kind::Map(_) = node.kind {
            let fields = self.fields(node, path, &["slower_than"])?;
            return self.required(&fields, "slower_than", Self::duration).map(Keep::SlowerThan);
        }
        if matches!(&node.kind, Kind::Text(text) if text == "slower_than") {
            self.wrong(node.place, path, "needs a duration; write `slower_than: 5s`");
            return None;
        }
        self.choice(node, path, &[("failed", Keep::Failed), ("retried", Keep::Retried)])
    }

    // Steps.

    fn steps<'n>(&mut self, node: &'n Node, path: &str) -> Option<Vec<ReadStep<'n>>> {
        let Kind::List(items) = &node.kind else {
            self.kind(node, path, "a list of steps");
            return None;
        };
        if items.len() > MAX_STEPS {
            // Before reading them: their other problems would bury this one.
            let count = items.len();
            self.wrong(node.place, path, GraphError::TooManySteps { count }.to_string());
            return None;
        }
        let mut steps = Vec::with_capacity(items.len());
        for (index, node) in items.iter().enumerate() {
            let definition = self.step(node, &format!("{path}[{index}]"));
            steps.extend(definition.map(|definition| ReadStep { index, definition, node }));
        }
        // A step that could not be read would make others look wrong.
        (steps.len() == items.len()).then_some(steps)
    }

    fn step(&mut self, node: &Node, path: &str) -> Option<StepDefinition> {
        let fields = self.fields(node, path, &STEP_KEYS)?;
        let name = self.required(&fields, "name", Self::name);
        let wait = self.optional(&fields, "wait", Self::wait);
        let task = self.optional(&fields, "task", Self::task);
        let handler = if fields.get("wait").is_some() {
            self.only_waits(&fields);
            None
        } else if fields.get("task").is_some() {
            self.only_starts(&fields);
            None
        } else {
            self.required(&fields, "handler", Self::handler)
        };
        let depends_on = self.optional(&fields, "depends_on", |read, node, path| read.list(node, path, Self::text));
        let join = self.optional(&fields, "join", |read, node, path| {
            read.choice(node, path, &[("all", Join::All), ("taken", Join::Taken), ("any", Join::Any)])
        });
        let when = self.optional(&fields, "when", Self::text);
        let branches = self.optional(&fields, "branches", |read, node, path| {
            let names = read.list(node, path, Self::text)?;
            if names.is_empty() {
                read.wrong(node.place, path, "is an empty list; name the dependents to choose among");
            }
            Some(names)
        });
        let for_each = self.optional(&fields, "for_each", Self::text);
        let max_parallel =
            self.optional(&fields, "max_parallel", |read, node, path| read.whole(node, path, 1..=MAX_PARALLEL));
        let on_item_failure = self.optional(&fields, "on_item_failure", Self::on_item_failure);
        if for_each.is_none() {
            for key in ["max_parallel", "on_item_failure"] {
                if let Some(node) = fields.get(key) {
                    let message = "means something only in a step with `for_each`; add it, or remove this";
                    self.wrong(node.place, fields.path(key), message);
                }
            }
        }
        let input = self.optional(&fields, "input", |_, node, _| Some(node.to_value()));
        let queue = self.optional(&fields, "queue", Self::namespace);
        let priority =
            self.optional(&fields, "priority", |read, node, path| read.whole(node, path, i32::MIN..=i32::MAX));
        let concurrency = self.optional(&fields, "concurrency", Self::concurrency);
        let rate = self.optional(&fields, "rate", Self::rate);
        let retry = self.optional(&fields, "retry", Self::retry);
        let timeouts = self.optional(&fields, "timeouts", Self::step_timeouts);
        Some(StepDefinition {
            name: name?,
            // Checking what depends on the name is worth more than waiting for
            // the handler to be right.
            handler: handler.unwrap_or_default(),
            wait,
            task,
            depends_on: depends_on.unwrap_or_default(),
            join: join.unwrap_or_default(),
            when,
            branches: branches.unwrap_or_default(),
            for_each,
            max_parallel,
            on_item_failure: on_item_failure.unwrap_or_default(),
            input,
            queue,
            priority: priority.unwrap_or_default(),
            concurrency,
            rate,
            retry: retry.unwrap_or_default(),
            timeouts: timeouts.unwrap_or_default(),
        })
    }

    fn concurrency(&mut self, node: &Node, path: &str) -> Option<Concurrency> {
        let fields = self.fields(node, path, &CONCURRENCY_KEYS)?;
        let key = self.optional(&fields, "key", Self::limit_key);
        Some(Concurrency { key, limit: self.required(&fields, "limit", Self::limit)? })
    }

    fn rate(&mut self, node: &Node, path: &str) -> Option<Rate> {
        let fields = self.fields(node, path, &RATE_KEYS)?;
        let key = self.optional(&fields, "key", Self::limit_key);
        let limit = self.required(&fields, "limit", Self::limit);
        let per = self.required(&fields, "per", Self::duration);
        Some(Rate { key, limit: limit?, per: per? })
    }

    fn limit(&mut self, node: &Node, path: &str) -> Option<i32> {
        if matches!(&node.kind, Kind::Number(number) if number.as_i64() == Some(0)) {
            let message = "0 would let nothing run, ever; pause the queue with `tasker queue pause` instead";
            self.wrong(node.place, path, message);
            return None;
        }
        self.whole(node, path, 1..=MAX_LIMIT)
    }

    fn limit_key(&mut self, node: &Node, path: &str) -> Option<String> {
        let key = self.text(node, path)?;
        match key_template(&key) {
            Ok(_) if !key.is_empty() => Some(key),
            Ok(_) => {
                self.wrong(node.place, path, "is empty; write a text such as ${input.customer_id}");
                None
            }
            Err(message) => {
                self.wrong(node.place, path, message);
                None
            }
        }
    }

    /// `fail`, `continue`, or `threshold:` with a count or a share such as `5%`.
    fn on_item_failure(&mut self, node: &Node, path: &str) -> Option<OnItemFailure> {
        if !matches!(node.kind, Kind::Map(_)) {
            return self.choice(node, path, &[("fail", OnItemFailure::Fail), ("continue", OnItemFailure::Continue)]);
        }
        let fields = self.fields(node, path, &["threshold"])?;
        self.required(&fields, "threshold", |read, node, path| {
            let Kind::Text(text) = &node.kind else {
                return read.whole(node, path, 1..=MAX_ITEMS).map(OnItemFailure::Count);
            };
            let percent = text.strip_suffix('%').and_then(|number| number.parse::<u32>().ok());
            if let Some(percent) = percent.filter(|percent| (1..=99).contains(percent)) {
                return Some(OnItemFailure::Percent(percent));
            }
            let message = format!("`{}` is neither a count of items nor a share from 1% to 99%", shown(text));
            read.wrong(node.place, path, message);
            None
        })
    }

    /// A step that waits has nothing that only a worker could heed.
    fn only_waits(&mut self, fields: &Fields<'_>) {
        for (key, advice) in [
            ("handler", "a step either waits or runs a handler; put the handler into a step that depends on this one"),
            ("task", "a step either waits or starts a task; put the task into a step that depends on this one"),
            ("input", "a wait has no input; give it to the step that depends on this one"),
            ("queue", "a wait is in no queue; remove the line"),
            ("concurrency", "a wait takes nobody's place; remove the line"),
            ("rate", "a wait takes nobody's place; remove the line"),
            ("branches", "a wait decides nothing; let the step that depends on it decide"),
            ("retry", "a wait is not tried again; see wait.on_timeout"),
            ("for_each", "a wait is not run for items; put the wait before the map"),
            ("max_parallel", "a wait is not run for items; remove the line"),
            ("on_item_failure", "a wait is not run for items; remove the line"),
        ] {
            if let Some(node) = fields.get(key) {
                self.wrong(node.place, fields.path(key), advice);
            }
        }
        self.only_total(fields, "a wait has no worker to hurry; only timeouts.total applies");
    }

    /// A step that starts a task has nothing that only a worker could heed; the task's own steps do.
    fn only_starts(&mut self, fields: &Fields<'_>) {
        for (key, advice) in [
            ("handler", "a step either starts a task or runs a handler; put the handler into a step of its own"),
            ("queue", "a step that starts a task is in no queue; the steps of that task are"),
            ("concurrency", "a step that starts a task takes nobody's place; limit the steps of that task"),
            ("rate", "a step that starts a task takes nobody's place; limit the steps of that task"),
            ("branches", "a task decides nothing for its parent; let the step that depends on this one decide"),
        ] {
            if let Some(node) = fields.get(key) {
                self.wrong(node.place, fields.path(key), advice);
            }
        }
        self.only_total(fields, "a step that starts a task has no worker to hurry; only timeouts.total applies");
    }

    fn only_total(&mut self, fields: &Fields<'_>, advice: &str) {
        let Some(Node { kind: Kind::Map(timeouts), .. }) = fields.get("timeouts") else {
            return;
        };
        for entry in timeouts.iter().filter(|entry| entry.key != "total") {
            let path = format!("{}.{}", fields.path("timeouts"), shown(&entry.key));
            self.wrong(entry.key_place, path, advice);
        }
    }

    fn task(&mut self, node: &Node, path: &str) -> Option<ChildTask> {
        let fields = self.fields(node, path, &TASK_KEYS)?;
        let template = self.required(&fields, "template", Self::name);
        let version = self.optional(&fields, "version", Self::version);
        let namespace = self.optional(&fields, "namespace", Self::namespace);
        let awaited = self.optional(&fields, "await", |read, node, path| {
            let Kind::Bool(awaited) = node.kind else {
                read.kind(node, path, "true or false");
                return None;
            };
            Some(awaited)
        });
        Some(ChildTask { template: template?, version, namespace, awaited: awaited.unwrap_or(true) })
    }

    fn wait(&mut self, node: &Node, path: &str) -> Option<WaitFor> {
        let fields = self.fields(node, path, &WAIT_KEYS)?;
        let kinds = ["sleep", "until", "signal"];
        let given: Vec<&str> = kinds.into_iter().filter(|kind| fields.get(kind).is_some()).collect();
        let [kind] = given[..] else {
            let message = "needs exactly one of sleep, until and signal, such as `sleep: 3d` or `signal: approved`";
            self.wrong(fields.place, path, message);
            return None;
        };
        if kind != "signal" {
            for key in ["allowed", "timeout", "on_timeout"] {
                if let Some(node) = fields.get(key) {
                    self.wrong(node.place, fields.path(key), format!("belongs to a signal; `{kind}` ends by itself"));
                }
            }
        }
        match kind {
            "sleep" => self.optional(&fields, "sleep", Self::duration).map(WaitFor::Sleep),
            "until" => self.optional(&fields, "until", Self::until).map(WaitFor::Until),
            _ => self.signal(&fields).map(WaitFor::Signal),
        }
    }

    /// A reference, or a time that is one already.
    fn until(&mut self, node: &Node, path: &str) -> Option<String> {
        let fits = |text: &str| text.contains("${") || chrono::DateTime::parse_from_rfc3339(text).is_ok();
        self.text_where(node, path, fits, |text| {
            format!(
                "`{}` is neither a reference such as \"${{input.at}}\" nor a time such as 2030-01-31T12:00:00Z",
                shown(text)
            )
        })
    }

    fn signal(&mut self, fields: &Fields<'_>) -> Option<SignalWait> {
        let name = self.optional(fields, "signal", Self::name);
        let allowed = self.optional(fields, "allowed", |read, node, path| {
            let answers = read.list(node, path, |read, node, path| {
                let fits = |text: &str| !text.trim().is_empty() && text.chars().count() <= MAX_ANSWER_CHARS;
                read.text_where(node, path, fits, |_| {
                    format!("must have 1 to {MAX_ANSWER_CHARS} characters, such as approve")
                })
            })?;
            if answers.is_empty() || answers.len() > MAX_ANSWERS {
                let message = format!("must list 1 to {MAX_ANSWERS} answers, such as [approve, reject]");
                read.wrong(node.place, path, message);
            }
            Some(answers)
        });
        let timeout = self.optional(fields, "timeout", Self::duration);
        let on_timeout = self.optional(fields, "on_timeout", |read, node, path| {
            read.choice(node, path, &[("fail", OnTimeout::Fail), ("continue", OnTimeout::Continue)])
        });
        if let (Some(node), None) = (fields.get("on_timeout"), fields.get("timeout")) {
            self.wrong(
                node.place,
                fields.path("on_timeout"),
                "there is no timeout; add `timeout: 2d`, or remove the line",
            );
        }
        Some(SignalWait {
            name: name?,
            allowed: allowed.unwrap_or_default(),
            timeout,
            on_timeout: on_timeout.unwrap_or_default(),
        })
    }

    fn retry(&mut self, node: &Node, path: &str) -> Option<RetryPolicy> {
        let fields = self.fields(node, path, &RETRY_KEYS)?;
        let default = RetryPolicy::default();
        let max_attempts =
            self.optional(&fields, "max_attempts", |read, node, path| read.whole(node, path, 1..=MAX_ATTEMPTS));
        let initial_interval = self.optional(&fields, "initial_interval", Self::duration);
        let backoff_coefficient = self.optional(&fields, "backoff_coefficient", |read, node, path| {
            read.decimal(node, path, 1.0..=MAX_COEFFICIENT)
        });
        let max_interval = self.optional(&fields, "max_interval", Self::duration);
        let jitter = self.optional(&fields, "jitter", |read, node, path| read.decimal(node, path, 0.0..=1.0));
        let non_retryable_errors = self.optional(&fields, "non_retryable_errors", Self::error_types);
        let on_exhausted = self.optional(&fields, "on_exhausted", |read, node, path| {
            read.choice(
                node,
                path,
                &[("fail", OnExhausted::Fail), ("block", OnExhausted::Block), ("continue", OnExhausted::Continue)],
            )
        });
        let policy = RetryPolicy {
            max_attempts: max_attempts.unwrap_or(default.max_attempts),
            initial_interval: initial_interval.unwrap_or(default.initial_interval),
            backoff_coefficient: backoff_coefficient.unwrap_or(default.backoff_coefficient),
            max_interval: max_interval.unwrap_or(default.max_interval),
            jitter: jitter.unwrap_or(default.jitter),
            non_retryable_errors: non_retryable_errors.unwrap_or_default(),
            on_exhausted: on_exhausted.unwrap_or_default(),
        };
        if policy.max_interval < policy.initial_interval {
            let (initial, max) = (policy.initial_interval, policy.max_interval);
            let (initial, max) = (format_duration(initial), format_duration(max));
            match (fields.get("max_interval"), fields.get("initial_interval")) {
                (Some(node), _) => self.wrong(
                    node.place,
                    fields.path("max_interval"),
                    format!("{max} is shorter than initial_interval, {initial}; raise it"),
                ),
                (None, Some(node)) => self.wrong(
                    node.place,
                    fields.path("initial_interval"),
                    format!("{initial} is longer than the default max_interval, {max}; set that too"),
                ),
                (None, None) => {}
            }
        }
        Some(policy)
    }

    fn error_types(&mut self, node: &Node, path: &str) -> Option<Vec<String>> {
        let types = self.list(node, path, |read, node, path| {
            let fits = |text: &str| !text.trim().is_empty() && text.chars().count() <= MAX_ERROR_TYPE_CHARS;
            read.text_where(node, path, fits, |_| {
                format!("must have 1 to {MAX_ERROR_TYPE_CHARS} characters, such as CardDeclined")
            })
        })?;
        if types.len() > MAX_ERROR_TYPES {
            let message = format!("lists {} error types, more than {MAX_ERROR_TYPES}", types.len());
            self.wrong(node.place, path, message);
        }
        Some(types)
    }

    fn step_timeouts(&mut self, node: &Node, path: &str) -> Option<StepTimeouts> {
        let fields = self.fields(node, path, &STEP_TIMEOUT_KEYS)?;
        let default = StepTimeouts::default();
        let queue = self.optional(&fields, "queue", Self::duration);
        let run = self.optional(&fields, "run", Self::duration);
        let total = self.optional(&fields, "total", Self::duration);
        let heartbeat = self.optional(&fields, "heartbeat", |read, node, path| {
            let heartbeat = read.duration(node, path)?;
            if heartbeat < SHORTEST_HEARTBEAT {
                let shortest = format_duration(SHORTEST_HEARTBEAT);
                read.wrong(node.place, path, format!("must be at least {shortest}; workers renew it three times"));
            }
            Some(heartbeat)
        });
        Some(StepTimeouts {
            queue,
            run: run.unwrap_or(default.run),
            total,
            heartbeat: heartbeat.unwrap_or(default.heartbeat),
        })
    }
}

fn starts_with_letter(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_lowercase())
}

fn only_lower(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

/// `^[a-z][a-z0-9_]{0,39}$`
fn is_name(text: &str) -> bool {
    starts_with_letter(text) && only_lower(text) && text.len() <= 40
}

/// `^[a-z](_?[a-z0-9])*$`, at most 40 bytes: `__` separates the two parts of a
/// queue's name.
fn is_queue_part(text: &str) -> bool {
    is_name(text) && !text.contains("__") && !text.ends_with('_')
}

/// `^[a-z][a-z0-9_]*(\.[a-z0-9_]+)*$`, at most 100 bytes.
fn is_handler(text: &str) -> bool {
    text.len() <= MAX_HANDLER_BYTES
        && starts_with_letter(text)
        && text.split('.').all(|part| !part.is_empty() && only_lower(part))
}

fn is_version(text: &str) -> bool {
    (1..=MAX_VERSION_CHARS).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())
}

/// A JSON pointer as a path into the node it was made for.
fn pointer_path(pointer: &str, node: &Node) -> Vec<Segment> {
    let mut path = Vec::new();
    let mut value = &node.kind;
    for part in pointer.split('/').skip(1) {
        let part = part.replace("~1", "/").replace("~0", "~");
        let (segment, inner) = match value {
            Kind::List(items) => {
                let Some(index) = part.parse::<usize>().ok().filter(|i| *i < items.len()) else {
                    break;
                };
                (Segment::Index(index), &items[index])
            }
            Kind::Map(entries) => {
                let Some(entry) = entries.iter().find(|entry| entry.key == part) else {
                    break;
                };
                (Segment::Key(part), &entry.value)
            }
            _ => break,
        };
        path.push(segment);
        value = &inner.kind;
    }
    path
}
