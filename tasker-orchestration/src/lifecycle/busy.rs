//! Who in this process settles which task: results of a task that another settler holds are
//! left with that settler, which settles them next.
//!
//! Only a shortcut: without it they would find the task's row locked and go back to their
//! queue, and one wide task would be read twice. Whatever is lost here is hidden for a moment
//! in its queue and comes back.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use uuid::Uuid;

use super::Hint;

/// The tasks that are being settled, each with the hints that came for it meanwhile.
#[derive(Debug, Default)]
pub struct Busy {
    tasks: Mutex<HashMap<Uuid, Vec<Hint>>>,
    left: Notify,
}

/// The tasks that one settler has entered; leaving them is certain.
pub(super) struct Entered<'a> {
    busy: &'a Busy,
    tasks: HashSet<Uuid>,
}

impl Busy {
    fn tasks(&self) -> MutexGuard<'_, HashMap<Uuid, Vec<Hint>>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters the tasks that nobody holds and answers their hints; the others stay with their holders.
    pub(super) fn enter(&self, hints: Vec<Hint>) -> (Entered<'_>, Vec<Hint>) {
        let mut entered = Entered { busy: self, tasks: HashSet::new() };
        let mut mine = Vec::with_capacity(hints.len());
        let mut tasks = self.tasks();
        for hint in hints {
            match hint.task() {
                Some(task) if !entered.tasks.contains(&task) => {
                    if let Some(waiting) = tasks.get_mut(&task) {
                        waiting.push(hint);
                        continue;
                    }
                    tasks.insert(task, Vec::new());
                    entered.tasks.insert(task);
                    mine.push(hint);
                }
                _ => mine.push(hint),
            }
        }
        drop(tasks);
        (entered, mine)
    }

    /// Leaves the hints of tasks that somebody holds with their holders; answers how many those were.
    pub(super) fn leave(&self, hints: &mut Vec<Hint>) -> usize {
        let before = hints.len();
        let mut tasks = self.tasks();
        let held = |hint: &mut Hint| hint.task().is_some_and(|task| tasks.contains_key(&task));
        for hint in hints.extract_if(.., held).collect::<Vec<_>>() {
            if let Some(waiting) = hint.task().and_then(|task| tasks.get_mut(&task)) {
                waiting.push(hint);
            }
        }
        before - hints.len()
    }

    /// Waits until somebody has left a task.
    pub(super) async fn left(&self) {
        self.left.notified().await;
    }
}

impl Entered<'_> {
    /// What came for these tasks meanwhile; the tasks for which nothing came are left.
    pub(super) fn next(&mut self) -> Vec<Hint> {
        let mut tasks = self.busy.tasks();
        let mut next = Vec::new();
        self.tasks.retain(|task| match tasks.get_mut(task).map(std::mem::take) {
            Some(waiting) if !waiting.is_empty() => {
                next.extend(waiting);
                true
            }
            _ => {
                tasks.remove(task);
                false
            }
        });
        drop(tasks);
        self.busy.left.notify_waiters();
        next
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut tasks = self.busy.tasks();
        for task in &self.tasks {
            tasks.remove(task);
        }
        drop(tasks);
        self.busy.left.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use tokio_util::task::TaskTracker;

    use super::*;
    use tasker_shared::state_machine::Event;

    use crate::lifecycle::{Request, Source};

    fn due(task: Uuid, open: &TaskTracker) -> Hint {
        let source = Source::Found { due_id: None, open: open.token() };
        Hint { request: Request::Event(task, Event::SignalDue), source }
    }

    fn tasks(hints: &[Hint]) -> Vec<Option<Uuid>> {
        hints.iter().map(Hint::task).collect()
    }

    #[test]
    fn what_is_due_of_a_task_is_left_with_its_settler_and_waited_for() {
        let (busy, held, free) = (Busy::default(), Uuid::from_u128(1), Uuid::from_u128(2));
        let (settler, open) = (TaskTracker::new(), TaskTracker::new());
        let (mut entered, first) = busy.enter(vec![due(held, &settler)]);
        assert_eq!(tasks(&first), [Some(held)]);
        open.close();
        let mut mine = vec![due(held, &open), due(free, &open), due(held, &open)];
        assert_eq!(busy.leave(&mut mine), 2);
        assert_eq!(tasks(&mine), [Some(free)]);
        drop(mine);
        let next = entered.next();
        assert_eq!(tasks(&next), [Some(held), Some(held)]);
        assert!(open.wait().now_or_never().is_none(), "its settler has not done it yet");
        drop(next);
        assert!(open.wait().now_or_never().is_some());
        assert!(entered.next().is_empty());
        assert_eq!(busy.leave(&mut vec![due(held, &open)]), 0, "nobody holds it any more");
    }

    #[test]
    fn who_waits_for_a_settler_that_gives_up_waits_no_longer() {
        let (busy, task, open) = (Busy::default(), Uuid::from_u128(1), TaskTracker::new());
        let (entered, _) = busy.enter(vec![due(task, &TaskTracker::new())]);
        open.close();
        assert_eq!(busy.leave(&mut vec![due(task, &open)]), 1);
        assert!(open.wait().now_or_never().is_none());
        drop(entered);
        assert!(open.wait().now_or_never().is_some());
    }
}
