//! Admission before send: how much each queue may still be given, and who waits for room.
//!
//! An estimate in memory, refreshed beside the hot path and never on it: a settle takes from
//! it without a statement. What finds no room is held in the database, so a wrong estimate
//! costs a little delay or a slightly longer queue, never a step.

use std::collections::HashMap;
use std::sync::Mutex;

use tasker_shared::queue;
use tasker_shared::state_machine::plan::{QueueRoom, Room};
use tasker_shared::store::Error;
use tokio::sync::Notify;
use tracing::instrument;

use super::{Hint, Look, Shared, settle};

/// Steps admitted in one pass, at most.
const PASS: i32 = 1000;

/// The room of every queue.
#[derive(Debug, Default)]
pub struct Admission {
    room: Mutex<Room>,
    /// Wakes the admit loop.
    pub wake: Notify,
}

impl Admission {
    /// Lets a settle take from the room.
    pub fn with_room<T>(&self, work: impl FnOnce(&mut Room) -> T) -> T {
        work(
            &mut self
                .room
                .lock()
                .expect("deciding does not panic while it holds the room"),
        )
    }

    /// A settle committed: where room runs low or steps are held, the estimate is made anew.
    pub fn settled(&self) {
        if self.with_room(|room| room.queues().any(|(_, queue)| queue.is_low())) {
            self.wake.notify_one();
        }
    }
}

/// Reads the room anew.
#[instrument(level = "debug", skip_all)]
pub async fn refresh(shared: &Shared) -> Result<(), Error> {
    let rows = queue::room(&mut *shared.reads.acquire().await?).await?;
    let mut fresh = Room::default();
    for row in rows {
        let room = QueueRoom {
            left: row.room,
            capacity: row.capacity,
            handlers: row.handlers.into_iter().collect(),
            holding: row.holding,
        };
        fresh.set(row.queue.into(), room);
    }
    shared.admission.with_room(|room| *room = fresh);
    Ok(())
}

/// Sends held steps for which there is room now, priority first; answers whether it found any,
/// so that a next pass may find more.
#[instrument(level = "debug", skip_all)]
pub async fn admit(shared: &Shared) -> Result<bool, super::Error> {
    refresh(shared).await?;
    let queues: HashMap<String, QueueRoom> = shared.admission.with_room(|room| {
        room.queues()
            .filter(|(_, queue)| queue.holding && queue.left > 0)
            .map(|(name, queue)| (name.to_string(), queue.clone()))
            .collect()
    });
    let mut more = false;
    for (name, room) in queues {
        let handlers: Vec<String> = room.handlers.into_iter().collect();
        let max = i32::try_from(room.left).unwrap_or(PASS).min(PASS);
        let held = queue::held_steps(
            &mut *shared.reads.acquire().await.map_err(Error::from)?,
            &name,
            &handlers,
            max,
        )
        .await?;
        if held.is_empty() {
            continue;
        }
        // Also when these were the last: the next look clears `holding`, and steps go out at once again.
        more = true;
        let hints = held
            .into_iter()
            .map(|(task, step)| Hint {
                task,
                look: Look::Admit(step),
                msg_id: None,
                due_id: None,
            })
            .collect();
        settle::settle(shared, queue::STEP_RESULTS, hints).await?;
    }
    Ok(more)
}
