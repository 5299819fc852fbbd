//! What happens to a task between its request and its end.

pub mod actions;
pub mod admission;
mod batch;
mod breaker;
mod busy;
mod faults;
pub mod inbox;
mod initialize;
pub(crate) mod limits;
mod load;
mod loaded;
pub(crate) mod locks;
mod maps;
mod measure;
mod nested;
mod operators;
pub mod queue;
mod read;
mod settle;
pub mod sweep;
mod turns;
mod waits;
mod write;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::export::Exporter;
use serde_json::Value;
use sqlx::{PgConnection, PgPool};
use tasker_shared::state_machine::Event;
use tasker_shared::store::outage::Outage;
use tasker_shared::store::templates::{self, TemplateError};
use tasker_shared::store::tx::Connections;
use tasker_shared::store::{self, Fault};
use tasker_shared::template::Compiled;
use tokio::sync::Notify;
use tokio_util::task::task_tracker::TaskTrackerToken;
use uuid::Uuid;

pub use self::admission::Admission;
use self::breaker::Breaker;
use self::busy::Busy;
use self::locks::{Locks, Subject};
use self::queue::Message;

/// Connections kept for settles: as many as usually settle at once.
const SETTLE_CONNECTIONS: usize = 3;

/// What every part of one orchestrator shares.
#[derive(Debug)]
pub struct Shared {
    /// For transactions: commits wait for the disk.
    pub pool: PgPool,
    /// For settles: connections of `pool` that are kept.
    pub connections: Connections,
    /// For queue reads: commits may be asynchronous.
    pub reads: PgPool,
    /// Names this orchestrator in queues' reader lists and in export batches.
    pub instance: Uuid,
    /// Delivers the tree; `None` when tracing is off, which may change at any time.
    exporter: RwLock<Option<Exporter>>,
    /// How much may be sent.
    pub admission: Admission,
    /// Whether the database is away: then the errors of all loops are logged once.
    pub outage: Arc<Outage>,
    /// Who settles what in this process.
    busy: Busy,
    /// What was put off because somebody else holds a lock.
    pub locks: Locks,
    /// Whether everything fails alike.
    breaker: Breaker,
    /// Wakes the sweep: something is due earlier than it thought.
    pub due: Notify,
    /// Wakes who follows the settings of traces.
    pub trace_settings: Arc<Notify>,
    /// Wakes who watches the workers: one of them may hold a claim soon.
    pub claims: Notify,
    templates: Mutex<HashMap<i32, Arc<Compiled>>>,
}

impl Shared {
    /// With nothing cached yet.
    pub fn new(pool: PgPool, reads: PgPool, instance: Uuid, exporter: Option<Exporter>) -> Self {
        Self {
            connections: Connections::new(pool.clone(), SETTLE_CONNECTIONS),
            outage: Outage::of(&pool),
            pool,
            reads,
            instance,
            exporter: RwLock::new(exporter),
            admission: Admission::default(),
            busy: Busy::default(),
            locks: Locks::default(),
            breaker: Breaker::default(),
            due: Notify::new(),
            claims: Notify::new(),
            trace_settings: Arc::default(),
            templates: Mutex::default(),
        }
    }

    /// What delivers the tree; `None` when tracing is off.
    pub fn exporter(&self) -> Option<Exporter> {
        self.exporter.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts another in its place, and answers the one that was there.
    pub fn replace_exporter(&self, exporter: Option<Exporter>) -> Option<Exporter> {
        std::mem::replace(&mut *self.exporter.write().unwrap_or_else(PoisonError::into_inner), exporter)
    }

    /// Templates by id; they never change, so they are read once.
    async fn templates(
        &self,
        conn: &mut PgConnection,
        ids: &[i32],
    ) -> Result<HashMap<i32, Arc<Compiled>>, TemplateError> {
        let mut found = HashMap::new();
        let mut missing = Vec::new();
        {
            let known = self.templates.lock().unwrap_or_else(PoisonError::into_inner);
            for id in ids {
                match known.get(id) {
                    Some(template) => drop(found.insert(*id, template.clone())),
                    None => missing.push(*id),
                }
            }
        }
        if !missing.is_empty() {
            missing.sort_unstable();
            missing.dedup();
            for template in templates::load(conn, &missing).await? {
                let id = template.definition.template_id;
                self.templates.lock().unwrap_or_else(PoisonError::into_inner).insert(id, template.clone());
                found.insert(id, template);
            }
        }
        Ok(found)
    }
}

/// What somebody asks for, and what brought it.
#[derive(Debug)]
pub struct Hint {
    request: Request,
    source: Source,
}

/// What a message asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    /// Create a task; the value has the keys that `tasker.submit_tasks` reads.
    Submit(Value),
    /// Keep a signal for a task, as `tasker.signal_task` does.
    Signal(SendSignal),
    /// Settle an event of a task.
    Event(Uuid, Event),
}

/// A signal that came as a raw message.
#[derive(Debug, Clone, PartialEq)]
pub struct SendSignal {
    /// Whom it is for.
    pub task: Uuid,
    /// Its name.
    pub name: String,
    /// What it says; null counts as `{}`.
    pub payload: Value,
    /// Who sent it.
    pub actor: String,
    /// The trace context of its headers.
    pub traceparent: Option<String>,
}

/// What brings a hint.
#[derive(Debug)]
enum Source {
    /// A message, deleted once it is settled.
    Message {
        /// Its id in its queue.
        id: i64,
        /// How often it was read.
        reads: i32,
    },
    /// A timer, or a held step: if this comes to nothing it is found again.
    Found {
        /// The timer to delete once it is settled.
        due_id: Option<i64>,
        /// Whoever waits for it hears of its end by this.
        #[expect(dead_code, reason = "its end is what it says")]
        open: TaskTrackerToken,
    },
}

impl Hint {
    /// What a message asks for.
    pub(crate) fn of(message: &Message, request: Request) -> Self {
        Self { request, source: Source::Message { id: message.msg_id, reads: message.read_ct } }
    }

    /// The task it is about, if there is one yet.
    fn task(&self) -> Option<Uuid> {
        match &self.request {
            Request::Submit(_) => None,
            Request::Signal(signal) => Some(signal.task),
            Request::Event(task, _) => Some(*task),
        }
    }

    /// Its message: the id, and how often it was read.
    fn message(&self) -> Option<(i64, i32)> {
        match self.source {
            Source::Message { id, reads } => Some((id, reads)),
            Source::Found { .. } => None,
        }
    }

    /// What a lock is met for.
    fn subject(&self) -> Subject {
        match (self.task(), self.message()) {
            (None, Some((id, _))) => Subject::Message(id),
            (task, _) => Subject::Task(task.unwrap_or_default()),
        }
    }

    /// What a settle reads of it, if it is an event.
    fn about(&self) -> Option<About<'_>> {
        let Request::Event(task, event) = &self.request else {
            return None;
        };
        let due_id = match self.source {
            Source::Found { due_id, .. } => due_id,
            Source::Message { .. } => None,
        };
        Some(About { task: *task, event, msg_id: self.message().map(|(id, _)| id), due_id })
    }
}

/// An event of a task, with the message or the timer to delete once it is settled.
#[derive(Debug, Clone, Copy)]
struct About<'a> {
    task: Uuid,
    event: &'a Event,
    msg_id: Option<i64>,
    due_id: Option<i64>,
}

/// A settle failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database or a row.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// A template.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A row that none of our code writes, or a defect.
    #[error("settling it panicked, as the log says where; this is a defect of Tasker")]
    Panicked,
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error.into())
    }
}

impl Error {
    /// Whose fault it is.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Store(error) | Self::Template(TemplateError::Store(error)) => error.fault(),
            Self::Template(_) | Self::Panicked => Fault::Message,
        }
    }

    /// Whether doing the same again may succeed; such an error never counts against a message.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Store(error) | Self::Template(TemplateError::Store(error)) => error.is_transient(),
            Self::Template(_) | Self::Panicked => false,
        }
    }
}
