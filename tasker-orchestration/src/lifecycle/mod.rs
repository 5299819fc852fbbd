//! What happens to a task between its request and its end.

pub mod actions;
pub mod admission;
mod batch;
mod breaker;
mod busy;
mod decisions;
pub mod initialize;
mod load;
pub(crate) mod locks;
mod measure;
mod nested;
mod outbox;
pub mod results;
pub mod schedules;
pub mod settle;
pub mod sweep;
mod turns;
mod waits;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use serde_json::Value;
use sqlx::{PgConnection, PgPool};
use tasker_shared::state_machine::decide::{ByHand, Operator};
use tasker_shared::store::outage::Outage;
use tasker_shared::store::templates::{self, Loaded, TemplateError};
use tasker_shared::store::tx::Lines;
use tasker_shared::store::{self, Fault};
use tasker_shared::trace::export::Exporter;
use tokio::sync::Notify;
use uuid::Uuid;

pub use self::admission::Admission;
use self::breaker::Breaker;
use self::busy::Busy;
use self::locks::Locks;

/// Connections kept for settles: as many as usually settle at once.
const SETTLE_LINES: usize = 3;

/// What every part of one orchestrator shares.
#[derive(Debug)]
pub struct Shared {
    /// For transactions: commits wait for the disk.
    pub pool: PgPool,
    /// For settles: connections of `pool` that are kept.
    pub lines: Lines,
    /// For queue reads: commits may be asynchronous.
    pub reads: PgPool,
    /// Names this orchestrator in queues' reader lists and in export batches.
    pub instance: Uuid,
    /// Delivers the tree; `None` when tracing is off, which may change at any time.
    exporter: RwLock<Option<Exporter>>,
    /// How much may be sent.
    pub admission: Admission,
    /// Whether the database is away: what every loop meets then is told once.
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
    templates: Mutex<HashMap<i32, Arc<Loaded>>>,
}

impl Shared {
    /// With nothing cached yet.
    pub fn new(pool: PgPool, reads: PgPool, instance: Uuid, exporter: Option<Exporter>) -> Self {
        Self {
            lines: Lines::new(pool.clone(), SETTLE_LINES),
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
    ) -> Result<HashMap<i32, Arc<Loaded>>, TemplateError> {
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

/// A reason to look at a task, and where it came from.
#[derive(Debug, Clone)]
pub struct Hint {
    /// The task to settle.
    pub task: Uuid,
    /// What to look at.
    pub look: Look,
    /// The message to delete once it is settled.
    pub msg_id: Option<i64>,
    /// The due hint to delete once it is settled.
    pub due_id: Option<i64>,
}

/// What a hint says happened; steps are named by uuid until their rows are loaded.
#[derive(Debug, Clone)]
pub enum Look {
    /// Begin the task.
    Start,
    /// An attempt was reported.
    Result(Uuid, i32),
    /// The message of an attempt's result is quarantined for this reason.
    Quarantined(Uuid, i32, String),
    /// A lease may have expired.
    Lease(Uuid),
    /// A retry may be due.
    Retry(Uuid),
    /// A step may have lain in its queue too long.
    Queue(Uuid),
    /// The task may have taken too long.
    Total,
    /// A held step may find room.
    Admit(Uuid),
    /// The wait of a step may be over.
    Timer(Uuid),
    /// A step may have taken longer than its template allows.
    StepTotal(Uuid),
    /// The task that an attempt started may have ended.
    Child(Uuid, i32),
    /// A signal was kept, and a step may wait for it.
    Signal,
    /// An operator ends it.
    Cancel(Operator),
    /// An operator ends it at once.
    Terminate(Operator),
    /// An operator suspends it.
    Suspend(Operator),
    /// An operator makes the failures of a blocked task final.
    GiveUp(Operator),
    /// An operator settled a blocked task outside.
    ResolveTask(Operator),
    /// An operator's act that is about the whole task.
    Operate(Operator, Act),
}

/// What an operator does that every step of the task is loaded for. Steps go by their names.
#[derive(Debug, Clone)]
pub enum Act {
    /// Go on.
    Resume,
    /// Try again what failed, or these only.
    Retry(Vec<String>),
    /// Run these again, and what follows from them.
    Rerun(Vec<String>),
    /// Settle this one, perhaps with an output.
    ByHand(String, ByHand, Option<Value>),
}

impl Act {
    /// The steps that it names.
    pub fn names(&self) -> &[String] {
        match self {
            Self::Resume => &[],
            Self::Retry(names) | Self::Rerun(names) => names,
            Self::ByHand(name, ..) => std::slice::from_ref(name),
        }
    }
}

impl Look {
    /// Whether an operator wishes it: what was wished once must not be done twice.
    pub fn is_wish(&self) -> bool {
        matches!(
            self,
            Self::Cancel(_)
                | Self::Terminate(_)
                | Self::Suspend(_)
                | Self::GiveUp(_)
                | Self::ResolveTask(_)
                | Self::Operate(..)
        )
    }

    /// The step that must be loaded.
    pub fn step(&self) -> Option<Uuid> {
        match self {
            Self::Result(step, _)
            | Self::Quarantined(step, ..)
            | Self::Lease(step)
            | Self::Retry(step)
            | Self::Queue(step)
            | Self::Timer(step)
            | Self::StepTotal(step)
            | Self::Child(step, _)
            | Self::Admit(step) => Some(*step),
            _ => None,
        }
    }
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
