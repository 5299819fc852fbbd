//! What the pages about one task are drawn from: read once for many who look, and shown to nobody who
//! may not see it.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tasker_shared::store::transitions;
use tasker_shared::store::views::{self, TaskView};
use tasker_shared::store::why::{self, Situation};
use tasker_shared::trace::log::TaskLog;
use uuid::Uuid;

use super::Page;
use super::rows::{self, Around, StepLine};
use crate::auth::Scope;
use crate::problem::Problem;

/// How old the picture of a task may be that many look at.
pub(super) const GOOD_FOR: Duration = Duration::from_millis(800);
/// How long what surrounds a task is believed: it never changes, but the task may be removed.
const AROUND_GOOD_FOR: Duration = Duration::from_mins(1);
/// With more steps than this the page does not wait for the trace: the script fetches it.
pub(super) const TRACE_WITH_PAGE: usize = 150;

/// What the page of a task is drawn from.
#[derive(Debug)]
pub(super) struct Seen {
    pub situation: Situation,
    pub around: Arc<Around>,
    pub steps: Vec<StepLine>,
    pub children: Vec<TaskView>,
}

/// A task that the caller may look at, or "not found" whatever the reason.
pub(super) async fn seen(page: &Page, task: Uuid) -> Result<Arc<Seen>, Problem> {
    page.who.require_scope(Scope::TasksRead)?;
    let seen = page.memory.tasks.get(task, page.good_for(GOOD_FOR, 6), async || {
        let around = page.memory.around.get(task, AROUND_GOOD_FOR, async || {
            Ok(rows::around(&mut *page.database.conn().await?, task).await?.map(Arc::new))
        });
        let Some(around) = around.await? else {
            return Ok(None);
        };
        let mut conn = page.database.conn().await?;
        let Some(situation) = why::situation(&mut conn, task).await? else {
            return Ok(None);
        };
        let steps = rows::step_lines(&mut conn, task).await?;
        let children = rows::children(&mut conn, task, &situation.task.correlation_id).await?;
        Ok(Some(Arc::new(Seen { situation, around, steps, children })))
    });
    let missing = || Problem::not_found(format!("task {task}"));
    let seen = seen.await?.ok_or_else(missing)?;
    if page.who.may(Scope::TasksRead, &seen.situation.task.namespace) { Ok(seen) } else { Err(missing()) }
}

pub(super) async fn read_log(page: &Page, task: Uuid) -> Result<(TaskLog, DateTime<Utc>), Problem> {
    let now = page.memory.now(&page.state).await?;
    let log = transitions::logs(&mut *page.database.conn().await?, &[task]).await?.pop();
    Ok((log.ok_or_else(|| Problem::not_found(format!("task {task}")))?, now))
}

/// Refuses who may not look at this task, with "not found" whatever the reason.
/// Answers its namespace.
pub(super) async fn may_look(page: &Page, task: Uuid) -> Result<String, Problem> {
    page.who.require_scope(Scope::TasksRead)?;
    let home = page.memory.homes.get(task, AROUND_GOOD_FOR, async || {
        let found = views::these(&mut *page.database.conn().await?, &[task]).await?.pop();
        Ok(found.map(|view| view.namespace))
    });
    let home = home.await?.filter(|home| page.who.reaches(home));
    home.ok_or_else(|| Problem::not_found(format!("task {task}")))
}
