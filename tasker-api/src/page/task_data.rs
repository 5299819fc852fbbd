//! The data of the pages about one task: read once for many viewers, and shown to nobody who
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
use super::rows::{self, StepLine, TaskDetail};
use crate::auth::Scope;
use crate::problem::Problem;

/// How old the data of a task may be that many look at.
pub(super) const GOOD_FOR: Duration = Duration::from_millis(800);
/// How long the detail of a task is believed: it never changes, but the task may be removed.
const DETAIL_GOOD_FOR: Duration = Duration::from_mins(1);
/// With more steps than this the page does not wait for the trace: the script fetches it.
pub(super) const TRACE_WITH_PAGE: usize = 150;

/// The data of the page of a task.
#[derive(Debug)]
pub(super) struct TaskData {
    pub situation: Situation,
    pub detail: Arc<TaskDetail>,
    pub steps: Vec<StepLine>,
    pub children: Vec<TaskView>,
}

/// A task that the caller may look at, or "not found" whatever the reason.
pub(super) async fn task_data(page: &Page, task: Uuid) -> Result<Arc<TaskData>, Problem> {
    page.who.require_scope(Scope::TasksRead)?;
    let data = page.memory.tasks.get(task, page.good_for(GOOD_FOR, 6), async || {
        let detail = page.memory.details.get(task, DETAIL_GOOD_FOR, async || {
            Ok(rows::task_detail(&mut *page.database.conn().await?, task).await?.map(Arc::new))
        });
        let Some(detail) = detail.await? else {
            return Ok(None);
        };
        let mut conn = page.database.conn().await?;
        let Some(situation) = why::situation(&mut conn, task).await? else {
            return Ok(None);
        };
        let steps = rows::step_lines(&mut conn, task).await?;
        let children = rows::children(&mut conn, task, &situation.task.correlation_id).await?;
        Ok(Some(Arc::new(TaskData { situation, detail, steps, children })))
    });
    let missing = || Problem::not_found(format!("task {task}"));
    let data = data.await?.ok_or_else(missing)?;
    if page.who.may(Scope::TasksRead, &data.situation.task.namespace) { Ok(data) } else { Err(missing()) }
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
    let home = page.memory.homes.get(task, DETAIL_GOOD_FOR, async || {
        let found = views::these(&mut *page.database.conn().await?, &[task]).await?.pop();
        Ok(found.map(|view| view.namespace))
    });
    let home = home.await?.filter(|home| page.who.reaches(home));
    home.ok_or_else(|| Problem::not_found(format!("task {task}")))
}
