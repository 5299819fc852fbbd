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

use super::batch::Item;

/// The tasks that are being settled, each with the items that came for it meanwhile.
#[derive(Debug, Default)]
pub struct Busy {
    tasks: Mutex<HashMap<Uuid, Vec<Item>>>,
    left: Notify,
}

/// The tasks that one settler has entered; leaving them is certain.
pub(super) struct Entered<'a> {
    busy: &'a Busy,
    tasks: HashSet<Uuid>,
}

impl Busy {
    fn tasks(&self) -> MutexGuard<'_, HashMap<Uuid, Vec<Item>>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters the tasks that nobody holds and answers their items; the others stay with their holders.
    pub(super) fn enter(&self, items: Vec<Item>) -> (Entered<'_>, Vec<Item>) {
        let mut entered = Entered { busy: self, tasks: HashSet::new() };
        let mut mine = Vec::with_capacity(items.len());
        let mut tasks = self.tasks();
        for item in items {
            match item.task() {
                Some(task) if !entered.tasks.contains(&task) => {
                    if let Some(waiting) = tasks.get_mut(&task) {
                        waiting.push(item);
                        continue;
                    }
                    tasks.insert(task, Vec::new());
                    entered.tasks.insert(task);
                    mine.push(item);
                }
                _ => mine.push(item),
            }
        }
        drop(tasks);
        (entered, mine)
    }

    /// Waits until somebody has left a task.
    pub(super) async fn left(&self) {
        self.left.notified().await;
    }
}

impl Entered<'_> {
    /// What came for these tasks meanwhile; the tasks for which nothing came are left.
    pub(super) fn next(&mut self) -> Vec<Item> {
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
