//! Admission before send: how much each queue may still be given, and who waits for room.
//!
//! An estimate in memory, refreshed beside the hot path and never on it: a settle takes from
//! it without a statement. What finds no room is held in the database, so a wrong estimate
//! costs a little delay or a slightly longer queue, never a step.

use std::sync::Mutex;

use tasker_shared::queue::{self, RoomRow};
use tasker_shared::state_machine::plan::{QueueRoom, Room};
use tasker_shared::store::{Error, flow};
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
        work(&mut self.room.lock().expect("deciding does not panic while it holds the room"))
    }

    /// A settle committed: where room runs low or steps are held, the estimate is made anew.
    pub fn settled(&self) {
        if self.with_room(|room| room.queues().any(|(_, queue)| queue.is_low())) {
            self.wake.notify_one();
        }
    }
}

/// Reads the room anew; answers the queues that hold steps back and have room for some.
///
/// Whether new steps queue behind held ones stays as it was: that is for [`admit`] to say,
/// which knows whether the held ones all fit. Else a single held step under load would make
/// every later one wait behind it for ever.
#[instrument(level = "debug", skip_all)]
pub async fn refresh(shared: &Shared) -> Result<Vec<RoomRow>, Error> {
    let mut conn = shared.reads.acquire().await?;
    let rows = queue::room(&mut conn).await?;
    let paused = flow::paused(&mut conn).await?;
    drop(conn);
    shared.admission.with_room(|room| {
        let mut fresh = Room::default();
        for row in &rows {
            let held_before = room.is_paused(&row.queue) || room.queue(&row.queue).is_none_or(|queue| queue.holding);
            let queue = QueueRoom {
                left: row.room,
                capacity: row.capacity,
                handlers: row.handlers.iter().cloned().collect(),
                holding: row.holding && held_before,
            };
            fresh.set(row.queue.as_str().into(), queue);
        }
        fresh.set_paused(paused.clone());
        *room = fresh;
    });
    Ok(rows.into_iter().filter(|row| row.holding && row.room > 0 && !paused.contains(&row.queue)).collect())
}

/// Sends held steps for which there is room now, priority first; answers whether it found any,
/// so that a next pass may find more.
#[instrument(level = "debug", skip_all)]
pub async fn admit(shared: &Shared) -> Result<bool, super::Error> {
    let mut more = false;
    for row in refresh(shared).await? {
        let max = i32::try_from(row.room).unwrap_or(PASS).min(PASS);
        let held =
            queue::held_steps(&mut *shared.reads.acquire().await.map_err(Error::from)?, &row.queue, &row.handlers, max)
                .await?;
        let all_fit = held.len() < usize::try_from(max).unwrap_or_default();
        shared.admission.with_room(|room| room.set_holding(&row.queue, !all_fit));
        if held.is_empty() {
            continue;
        }
        more = true;
        let hints = held
            .into_iter()
            .map(|(task, step)| Hint { task, look: Look::Admit(step), msg_id: None, due_id: None })
            .collect();
        settle::settle(shared, queue::STEP_RESULTS, hints).await?;
    }
    Ok(more)
}
