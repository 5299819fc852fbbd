//! Every state, every event, and every legal move, read as a table.
//!
//! `docs/reference/lifecycle.md` is compared with these tables by a test.

use std::str::FromStr;

/// Declares an enum whose variants have one spelling in the database, the log and the trace.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[expect(missing_docs, reason = "the words are explained in docs/reference/lifecycle.md")]
        pub enum $name { $($variant),+ }

        impl $name {
            /// All of them, in order of declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The one spelling.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl FromStr for $name {
            type Err = UnknownWord;

            fn from_str(word: &str) -> Result<Self, UnknownWord> {
                match word {
                    $($word => Ok(Self::$variant),)+
                    _ => Err(UnknownWord { kind: stringify!($name), word: word.chars().take(60).collect() }),
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

/// A word that no state or event has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{word:?} is not a {kind}")]
pub struct UnknownWord {
    kind: &'static str,
    word: String,
}

words!(
    /// The states of a task (one run of a workflow). `Initializing`, `EnqueuingSteps` and
    /// `EvaluatingResults` never rest in the row: they live in the log.
    TaskState {
        Pending = "pending",
        Initializing = "initializing",
        EnqueuingSteps = "enqueuing_steps",
        StepsInProcess = "steps_in_process",
        EvaluatingResults = "evaluating_results",
        WaitingForDependencies = "waiting_for_dependencies",
        WaitingForRetry = "waiting_for_retry",
        BlockedByFailures = "blocked_by_failures",
        Suspended = "suspended",
        Complete = "complete",
        Error = "error",
        Cancelled = "cancelled",
        ResolvedManually = "resolved_manually",
    }
);

words!(
    /// What moves a task.
    TaskEvent {
        Start = "Start",
        ReadyStepsFound = "ReadyStepsFound",
        NoStepsFound = "NoStepsFound",
        NoDependenciesReady = "NoDependenciesReady",
        InvalidInput = "InvalidInput",
        StepsEnqueued = "StepsEnqueued",
        AllStepsCompleted = "AllStepsCompleted",
        StepFailed = "StepFailed",
        StepCompleted = "StepCompleted",
        AttemptLost = "AttemptLost",
        RetryReady = "RetryReady",
        TimerFired = "TimerFired",
        SignalReceived = "SignalReceived",
        ChildFinished = "ChildFinished",
        StepsAdmitted = "StepsAdmitted",
        DependenciesReady = "DependenciesReady",
        StepsStillRunning = "StepsStillRunning",
        RetryScheduled = "RetryScheduled",
        PermanentFailure = "PermanentFailure",
        AllStepsSuccessful = "AllStepsSuccessful",
        OperatorRetry = "OperatorRetry",
        Rerun = "Rerun",
        TotalTimeout = "TotalTimeout",
        Suspend = "Suspend",
        Resume = "Resume",
        Cancel = "Cancel",
        Terminate = "Terminate",
        GiveUp = "GiveUp",
        ResolveManually = "ResolveManually",
    }
);

words!(
    /// The states of a step.
    StepState {
        Pending = "pending",
        Enqueued = "enqueued",
        InProgress = "in_progress",
        EnqueuedForOrchestration = "enqueued_for_orchestration",
        EnqueuedAsErrorForOrchestration = "enqueued_as_error_for_orchestration",
        WaitingForRetry = "waiting_for_retry",
        Waiting = "waiting",
        Complete = "complete",
        Error = "error",
        Cancelled = "cancelled",
        Skipped = "skipped",
        ResolvedManually = "resolved_manually",
    }
);

words!(
    /// What moves a step.
    StepEvent {
        Enqueue = "Enqueue",
        Claim = "Claim",
        Report = "Report",
        Complete = "Complete",
        ScheduleRetry = "ScheduleRetry",
        RetryReady = "RetryReady",
        Fail = "Fail",
        LeaseExpired = "LeaseExpired",
        RunTimeout = "RunTimeout",
        BeginWait = "BeginWait",
        TimerFired = "TimerFired",
        SignalReceived = "SignalReceived",
        ChildFinished = "ChildFinished",
        ItemsDone = "ItemsDone",
        Skip = "Skip",
        QueueTimeout = "QueueTimeout",
        TotalTimeout = "TotalTimeout",
        Cancel = "Cancel",
        ResolveManually = "ResolveManually",
        CompleteManually = "CompleteManually",
        OperatorRetry = "OperatorRetry",
        Rerun = "Rerun",
    }
);

words!(
    /// Why a ready step was not sent: the word of `held_by` and of `wait.reason`.
    HeldBy {
        Room = "room",
        Worker = "worker",
        Limit = "limit",
        Paused = "paused",
    }
);

impl TaskState {
    /// Final for its generation.
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Complete | Self::Error | Self::Cancelled | Self::ResolvedManually)
    }

    /// Passed through inside one transaction; never the value of the row.
    pub const fn is_passing(self) -> bool {
        matches!(self, Self::Initializing | Self::EnqueuingSteps | Self::EvaluatingResults)
    }

    /// The word people see beside the state.
    pub const fn public_status(self) -> &'static str {
        match self {
            Self::Pending => "queued",
            Self::Initializing | Self::EnqueuingSteps | Self::StepsInProcess | Self::EvaluatingResults => "running",
            Self::WaitingForDependencies | Self::WaitingForRetry | Self::BlockedByFailures => "waiting",
            Self::Suspended => "suspended",
            Self::Complete | Self::ResolvedManually => "completed",
            Self::Error => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl StepState {
    /// Final for its generation (an `error` may still be repaired while its task is blocked).
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Complete | Self::Error | Self::Cancelled | Self::Skipped | Self::ResolvedManually)
    }

    /// A message, a claim or a report of it exists: its task rests in `steps_in_process`.
    pub const fn is_in_flight(self) -> bool {
        matches!(
            self,
            Self::Enqueued | Self::InProgress | Self::EnqueuedForOrchestration | Self::EnqueuedAsErrorForOrchestration
        )
    }
}

/// A row of the task table: `(from, event, to)`.
pub type TaskMove = (TaskState, TaskEvent, TaskState);

/// Every legal move of a task, except those that start from any non-terminal or any
/// terminal state: see [`task_move_is_legal`].
pub const TASK_MOVES: &[TaskMove] = {
    use TaskEvent as E;
    use TaskState::{
        BlockedByFailures, Complete, EnqueuingSteps, Error, EvaluatingResults, Initializing, Pending, ResolvedManually,
        StepsInProcess, WaitingForDependencies, WaitingForRetry,
    };
    &[
        (Pending, E::Start, Initializing),
        (Initializing, E::ReadyStepsFound, EnqueuingSteps),
        (Initializing, E::NoStepsFound, Complete),
        (Initializing, E::NoDependenciesReady, WaitingForDependencies),
        (Initializing, E::InvalidInput, Error),
        (EnqueuingSteps, E::StepsEnqueued, StepsInProcess),
        (StepsInProcess, E::AllStepsCompleted, EvaluatingResults),
        (StepsInProcess, E::StepFailed, EvaluatingResults),
        (StepsInProcess, E::StepCompleted, EvaluatingResults),
        (StepsInProcess, E::AttemptLost, EvaluatingResults),
        (StepsInProcess, E::RetryReady, EnqueuingSteps),
        (StepsInProcess, E::TimerFired, EnqueuingSteps),
        (StepsInProcess, E::SignalReceived, EnqueuingSteps),
        (StepsInProcess, E::ChildFinished, EnqueuingSteps),
        (StepsInProcess, E::StepsAdmitted, EnqueuingSteps),
        (EvaluatingResults, E::ReadyStepsFound, EnqueuingSteps),
        (EvaluatingResults, E::StepsStillRunning, StepsInProcess),
        (EvaluatingResults, E::RetryScheduled, WaitingForRetry),
        (EvaluatingResults, E::NoDependenciesReady, WaitingForDependencies),
        (EvaluatingResults, E::PermanentFailure, BlockedByFailures),
        (EvaluatingResults, E::AllStepsSuccessful, Complete),
        (EvaluatingResults, E::PermanentFailure, Error),
        (BlockedByFailures, E::GiveUp, Error),
        (BlockedByFailures, E::ResolveManually, ResolvedManually),
        (WaitingForRetry, E::RetryReady, EnqueuingSteps),
        (WaitingForDependencies, E::StepsAdmitted, EnqueuingSteps),
    ]
};

/// Whether the move stands in the table, or is one of those that start from many states.
pub fn task_move_is_legal(from: TaskState, event: TaskEvent, to: TaskState) -> bool {
    use TaskEvent as E;
    use TaskState as S;
    if TASK_MOVES.contains(&(from, event, to)) {
        return true;
    }
    let waits = matches!(from, S::WaitingForRetry | S::WaitingForDependencies | S::BlockedByFailures);
    match event {
        // Whatever ends a wait, from any of the waiting states.
        E::RetryReady
        | E::TimerFired
        | E::SignalReceived
        | E::ChildFinished
        | E::DependenciesReady
        | E::StepsAdmitted
        | E::StepCompleted
        | E::StepFailed => waits && matches!(to, S::EnqueuingSteps | S::EvaluatingResults),
        // Repair; of a finished task it begins the next generation.
        E::OperatorRetry if waits => matches!(to, S::EvaluatingResults | S::EnqueuingSteps),
        E::OperatorRetry | E::Rerun => from.is_terminal() && to == S::EvaluatingResults,
        E::TotalTimeout => !from.is_terminal() && to == S::Error,
        E::Suspend => !from.is_terminal() && from != S::Suspended && to == S::Suspended,
        // Back to a state that rests in the row, or through an evaluation.
        E::Resume => {
            let rests = !to.is_terminal() && !to.is_passing() && to != S::Suspended;
            from == S::Suspended && (rests || to == S::EvaluatingResults)
        }
        E::Cancel | E::Terminate => !from.is_terminal() && to == S::Cancelled,
        _ => false,
    }
}

/// A row of the step table: `(from, event, to)`.
pub type StepMove = (StepState, StepEvent, StepState);

/// Every legal move of a step, except those that start from any non-terminal or any
/// terminal state: see [`step_move_is_legal`].
pub const STEP_MOVES: &[StepMove] = {
    use StepEvent as E;
    use StepState::{
        Cancelled, Complete, Enqueued, EnqueuedAsErrorForOrchestration, EnqueuedForOrchestration, Error, InProgress,
        Pending, ResolvedManually, Skipped, Waiting, WaitingForRetry,
    };
    &[
        (Pending, E::Enqueue, Enqueued),
        (Enqueued, E::Claim, InProgress),
        (InProgress, E::Report, EnqueuedForOrchestration),
        (InProgress, E::Report, EnqueuedAsErrorForOrchestration),
        (EnqueuedForOrchestration, E::Complete, Complete),
        (EnqueuedAsErrorForOrchestration, E::ScheduleRetry, WaitingForRetry),
        (EnqueuedAsErrorForOrchestration, E::Fail, Error),
        (WaitingForRetry, E::RetryReady, Enqueued),
        (InProgress, E::LeaseExpired, Enqueued),
        (InProgress, E::LeaseExpired, Error),
        (InProgress, E::RunTimeout, WaitingForRetry),
        (InProgress, E::RunTimeout, Error),
        (Pending, E::Fail, Error),
        (Enqueued, E::Fail, Error),
        (EnqueuedForOrchestration, E::Fail, Error),
        (Pending, E::BeginWait, Waiting),
        (EnqueuedForOrchestration, E::BeginWait, Waiting),
        (WaitingForRetry, E::BeginWait, Waiting),
        (Waiting, E::TimerFired, Enqueued),
        (Waiting, E::TimerFired, Complete),
        (Waiting, E::TimerFired, WaitingForRetry),
        (Waiting, E::TimerFired, Error),
        (Waiting, E::SignalReceived, Enqueued),
        (Waiting, E::SignalReceived, Complete),
        (Waiting, E::SignalReceived, WaitingForRetry),
        (Waiting, E::SignalReceived, Error),
        (Waiting, E::ChildFinished, Enqueued),
        (Waiting, E::ChildFinished, Complete),
        (Waiting, E::ChildFinished, WaitingForRetry),
        (Waiting, E::ChildFinished, Error),
        (Waiting, E::ItemsDone, Enqueued),
        (Waiting, E::ItemsDone, Complete),
        (Waiting, E::ItemsDone, WaitingForRetry),
        (Waiting, E::ItemsDone, Error),
        (Pending, E::Skip, Skipped),
        (Enqueued, E::QueueTimeout, Error),
        // Held, and never sent.
        (Pending, E::QueueTimeout, Error),
        (WaitingForRetry, E::QueueTimeout, Error),
        (Error, E::Skip, Skipped),
        (Error, E::ResolveManually, ResolvedManually),
        (Error, E::CompleteManually, Complete),
        (Error, E::OperatorRetry, Pending),
        (Cancelled, E::OperatorRetry, Pending),
    ]
};

/// Whether the move stands in the table, or is one of those that start from many states.
pub fn step_move_is_legal(from: StepState, event: StepEvent, to: StepState) -> bool {
    use StepEvent as E;
    use StepState as S;
    if STEP_MOVES.contains(&(from, event, to)) {
        return true;
    }
    match event {
        E::TotalTimeout => !from.is_terminal() && to == S::Error,
        E::Cancel => !from.is_terminal() && to == S::Cancelled,
        // By an operator, audited.
        E::Skip => !from.is_terminal() && to == S::Skipped,
        E::ResolveManually => !from.is_terminal() && to == S::ResolvedManually,
        E::CompleteManually => !from.is_terminal() && to == S::Complete,
        E::Rerun => from.is_terminal() && to == S::Pending,
        _ => false,
    }
}

/// What a row of the log says was moved, and how: nobody but the database holds it as words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// A move of the task.
    Task(TaskMove),
    /// A move of a step.
    Step(StepMove),
}

impl Change {
    /// Reads the three words of a row.
    ///
    /// # Errors
    /// If one of them is no word of ours; the answer names its column.
    pub fn parse(is_task: bool, from: &str, event: &str, to: &str) -> Result<Self, (&'static str, UnknownWord)> {
        fn read<S, E>(from: &str, event: &str, to: &str) -> Result<(S, E, S), (&'static str, UnknownWord)>
        where
            S: FromStr<Err = UnknownWord>,
            E: FromStr<Err = UnknownWord>,
        {
            let column = |name: &'static str| move |unknown| (name, unknown);
            let from = from.parse().map_err(column("from_state"))?;
            Ok((from, event.parse().map_err(column("event"))?, to.parse().map_err(column("to_state"))?))
        }
        if is_task { read(from, event, to).map(Self::Task) } else { read(from, event, to).map(Self::Step) }
    }

    /// The three words of its row: the state before it, the event, the state after it.
    const fn words(self) -> [&'static str; 3] {
        match self {
            Self::Task((from, event, to)) => [from.as_str(), event.as_str(), to.as_str()],
            Self::Step((from, event, to)) => [from.as_str(), event.as_str(), to.as_str()],
        }
    }

    /// The state before it, as a word.
    pub const fn from(self) -> &'static str {
        self.words()[0]
    }

    /// The event, as a word.
    pub const fn event(self) -> &'static str {
        self.words()[1]
    }

    /// The state after it, as a word.
    pub const fn to(self) -> &'static str {
        self.words()[2]
    }
}

#[cfg(test)]
mod tests;
