//! What people ask for beyond tasks: acts on tasks, signals, schedules, queues, limits, retention, the audit.

#![warn(clippy::missing_errors_doc)]

use std::collections::HashMap;
use std::time::Duration;

use serde_json::Value;
use uuid::Uuid;

use super::{Client, ClientError, accepted, granted, refused, schedule_accepted};
use crate::schedule::{Schedule, Timing};
use crate::state_machine::decide::ByHand;
use crate::store::audit::AuditRow;
use crate::store::flow::{LimitUse, SetLimit};
use crate::store::requests::TaskRequest;
use crate::store::schedules::{self, ScheduleView};
use crate::store::views;
use crate::store::{audit, flow, requests, retention, signals, tx};
use crate::trace::context::{TRACEPARENT, inject_current};

impl Client {
    /// Asks for the task to end; its running handlers are told to stop. An orchestrator decides a moment later.
    ///
    /// # Errors
    /// [`ClientError::NotFound`] if there is no such task, [`ClientError::Refused`] if its state does not allow it,
    /// [`ClientError::Store`] if the database fails.
    pub async fn cancel(&self, task: Uuid, actor: Option<&str>, reason: Option<&str>) -> Result<(), ClientError> {
        let mut conn = tx::live(&self.pool).await?;
        accepted(task, requests::cancel(&mut conn, task, false, actor, reason).await?)
    }

    /// Asks for the task to end; its running handlers are dropped.
    ///
    /// # Errors
    /// [`ClientError::NotFound`] if there is no such task, [`ClientError::Refused`] if its state does not allow it,
    /// [`ClientError::Store`] if the database fails.
    pub async fn terminate(&self, task: Uuid, actor: Option<&str>, reason: Option<&str>) -> Result<(), ClientError> {
        let mut conn = tx::live(&self.pool).await?;
        accepted(task, requests::cancel(&mut conn, task, true, actor, reason).await?)
    }

    /// Asks for what failed or was cancelled to be tried again, keeping what is done.
    ///
    /// # Errors
    /// [`ClientError::NotFound`] if there is no such task, [`ClientError::Refused`] if its state does not allow it,
    /// [`ClientError::Store`] if the database fails.
    pub async fn retry(&self, task: Uuid, actor: Option<&str>, reason: Option<&str>) -> Result<(), ClientError> {
        self.retry_steps(task, &[], actor, reason).await
    }

    /// Asks for these failed steps of a blocked task to be tried again.
    ///
    /// # Errors
    /// [`ClientError::NotFound`] if there is no such task, [`ClientError::Refused`] if its state does not allow it,
    /// [`ClientError::Store`] if the database fails.
    pub async fn retry_steps(
        &self,
        task: Uuid,
        steps: &[String],
        actor: Option<&str>,
        reason: Option<&str>,
    ) -> Result<(), ClientError> {
        let mut conn = tx::live(&self.pool).await?;
        accepted(task, requests::retry(&mut conn, task, steps, actor, reason).await?)
    }

    /// Asks to suspend or resume a task, or to give up or resolve a blocked one.
    ///
    /// # Errors
    /// [`ClientError::NotFound`] if there is no such task, [`ClientError::Refused`] if its state does not allow it,
    /// [`ClientError::Store`] if the database fails.
    pub async fn act(
        &self,
        task: Uuid,
        request: TaskRequest,
        actor: Option<&str>,
        reason: Option<&str>,
    ) -> Result<(), ClientError> {
        let mut conn = tx::live(&self.pool).await?;
        accepted(task, requests::act(&mut conn, task, request, actor, reason).await?)
    }

    /// Asks for a finished task to run again from these steps, in a new generation.
    ///
    /// # Errors
    /// [`ClientError::NotFound`] if there is no such task, [`ClientError::Refused`] if its state does not allow it,
    /// [`ClientError::Store`] if the database fails.
    pub async fn rerun(
        &self,
        task: Uuid,
        from: &[String],
        actor: Option<&str>,
        reason: Option<&str>,
    ) -> Result<(), ClientError> {
        let mut conn = tx::live(&self.pool).await?;
        accepted(task, requests::rerun(&mut conn, task, from, actor, reason).await?)
    }

    /// Asks for a step to be settled by hand; the steps behind it read `output`.
    ///
    /// # Errors
    /// [`ClientError::NotFound`] if there is no such task, [`ClientError::Refused`] if its state does not allow it,
    /// [`ClientError::Store`] if the database fails.
    pub async fn settle_step(
        &self,
        task: Uuid,
        step: &str,
        act: ByHand,
        output: Option<Value>,
        actor: Option<&str>,
        reason: Option<&str>,
    ) -> Result<(), ClientError> {
        let mut conn = tx::live(&self.pool).await?;
        accepted(task, requests::settle_step(&mut conn, task, step, act, output, actor, reason).await?)
    }

    /// Does one act to a page of at most 1000 tasks that match `filter`; see `tasker.act_on_tasks`.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if the filter or the action is not valid, [`ClientError::Store`] if the database fails.
    pub async fn act_on_tasks(
        &self,
        filter: &Value,
        action: &str,
        dry_run: bool,
        actor: Option<&str>,
        reason: Option<&str>,
    ) -> Result<Value, ClientError> {
        let mut conn = tx::live(&self.pool).await?;
        requests::act_on_tasks(&mut conn, filter, action, dry_run, actor, reason).await.map_err(refused)
    }

    /// What operators did, newest first; to one task if it is named.
    ///
    /// # Errors
    /// [`ClientError::Store`] if the database fails.
    pub async fn audit(&self, task: Option<Uuid>, limit: u32) -> Result<Vec<AuditRow>, ClientError> {
        Ok(audit::audit_list(&mut *self.pool.acquire().await?, task, limit.into()).await?)
    }

    /// Creates a schedule, or changes the one of that name; answers created, changed or unchanged.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if the schedule is not valid or would never tick, [`ClientError::Store`] if the
    /// database fails.
    pub async fn set_schedule(&self, schedule: &Schedule, actor: Option<&str>) -> Result<String, ClientError> {
        let mut conn = tx::live(&self.pool).await?;
        let timing = schedule.timing(views::now(&mut conn).await?);
        let every_ms = match timing.map_err(|refused| ClientError::Refused(refused.to_string()))? {
            Timing::Every { every, .. } => Some(every.num_milliseconds()),
            _ => None,
        };
        schedules::set(&mut conn, schedule, every_ms, actor).await.map_err(refused)
    }

    /// Every schedule, or those of one namespace, by name.
    ///
    /// # Errors
    /// [`ClientError::Store`] if the database fails.
    pub async fn schedules(&self, namespace: Option<&str>) -> Result<Vec<ScheduleView>, ClientError> {
        Ok(schedules::list(&mut *self.pool.acquire().await?, namespace, None).await?)
    }

    /// One schedule; `None` if there is none of that name.
    ///
    /// # Errors
    /// [`ClientError::Store`] if the database fails.
    pub async fn schedule(&self, namespace: &str, name: &str) -> Result<Option<ScheduleView>, ClientError> {
        let found = || async { schedules::list(&mut *self.pool.acquire().await?, Some(namespace), Some(name)).await };
        let mut found = match found().await {
            Err(error) if tx::was_lost(&self.pool, &error) => found().await?,
            found => found?,
        };
        Ok(found.pop())
    }

    /// Pauses or resumes a schedule. What would have run while it was paused never runs.
    ///
    /// # Errors
    /// [`ClientError::Refused`] says why not, [`ClientError::Store`] if the database fails.
    pub async fn pause_schedule(
        &self,
        (namespace, name): (&str, &str),
        pause: bool,
        actor: Option<&str>,
        reason: Option<&str>,
    ) -> Result<(), ClientError> {
        let mut conn = tx::live(&self.pool).await?;
        schedule_accepted(schedules::pause(&mut conn, (namespace, name), pause, actor, reason).await?)
    }

    /// Deletes a schedule; the tasks it has submitted stay.
    ///
    /// # Errors
    /// [`ClientError::Refused`] says why not, [`ClientError::Store`] if the database fails.
    pub async fn delete_schedule(
        &self,
        (namespace, name): (&str, &str),
        actor: Option<&str>,
        reason: Option<&str>,
    ) -> Result<(), ClientError> {
        let mut conn = tx::live(&self.pool).await?;
        schedule_accepted(schedules::delete(&mut conn, (namespace, name), actor, reason).await?)
    }

    /// Runs a schedule now and answers the task; its next tick comes as planned.
    ///
    /// # Errors
    /// [`ClientError::Refused`] says why not, [`ClientError::Store`] if the database fails.
    pub async fn trigger_schedule(
        &self,
        (namespace, name): (&str, &str),
        actor: Option<&str>,
        reason: Option<&str>,
    ) -> Result<Uuid, ClientError> {
        let mut conn = tx::live(&self.pool).await?;
        schedules::trigger(&mut conn, (namespace, name), actor, reason).await?.map_err(ClientError::Refused)
    }

    /// Sends nothing more to a queue of steps and claims nothing from it; what runs runs on.
    ///
    /// # Errors
    /// [`ClientError::Refused`] says why not, [`ClientError::Store`] if the database fails.
    pub async fn pause_queue(&self, queue: &str, actor: Option<&str>, reason: Option<&str>) -> Result<(), ClientError> {
        let mut conn = tx::live(&self.pool).await?;
        granted(flow::pause(&mut conn, queue, false, actor, reason).await?)
    }

    /// Lets a paused queue go on.
    ///
    /// # Errors
    /// [`ClientError::Refused`] says why not, [`ClientError::Store`] if the database fails.
    pub async fn resume_queue(
        &self,
        queue: &str,
        actor: Option<&str>,
        reason: Option<&str>,
    ) -> Result<(), ClientError> {
        let mut conn = tx::live(&self.pool).await?;
        granted(flow::pause(&mut conn, queue, true, actor, reason).await?)
    }

    /// Says how long finished tasks and quarantined messages of a namespace are kept (`*`: of all
    /// that have no policy of their own). With neither time the policy is removed.
    ///
    /// # Errors
    /// [`ClientError::Refused`] says why not, [`ClientError::Store`] if the database fails.
    pub async fn set_retention(
        &self,
        namespace: &str,
        keep: Option<Duration>,
        keep_quarantine: Option<Duration>,
        archive: bool,
        actor: Option<&str>,
    ) -> Result<(), ClientError> {
        let mut conn = tx::live(&self.pool).await?;
        retention::set(&mut conn, namespace, keep, keep_quarantine, archive, actor).await.map_err(refused)
    }

    /// Limits a namespace or one handler in it; it takes effect for what is not yet sent.
    ///
    /// # Errors
    /// [`ClientError::Refused`] says why not, [`ClientError::Store`] if the database fails.
    pub async fn set_limit(
        &self,
        limit: &SetLimit,
        actor: Option<&str>,
        reason: Option<&str>,
    ) -> Result<(), ClientError> {
        let mut conn = tx::live(&self.pool).await?;
        granted(flow::set_limit(&mut conn, limit, actor, reason).await?)
    }

    /// Removes the limit of a namespace, or of one handler in it.
    ///
    /// # Errors
    /// [`ClientError::Refused`] says why not, [`ClientError::Store`] if the database fails.
    pub async fn remove_limit(
        &self,
        (namespace, handler): (&str, Option<&str>),
        actor: Option<&str>,
        reason: Option<&str>,
    ) -> Result<(), ClientError> {
        let mut conn = tx::live(&self.pool).await?;
        granted(flow::remove_limit(&mut conn, (namespace, handler), actor, reason).await?)
    }

    /// Says how many open tasks a namespace may have; submits beyond it are refused. `None` removes the
    /// limit. Only the owner of the schema may.
    ///
    /// # Errors
    /// [`ClientError::Refused`] says why not.
    pub async fn set_open_tasks_limit(
        &self,
        namespace: &str,
        open_tasks: Option<i32>,
        actor: Option<&str>,
        reason: Option<&str>,
    ) -> Result<(), ClientError> {
        let mut conn = self.pool.acquire().await?;
        granted(flow::set_open_tasks(&mut conn, namespace, open_tasks, actor, reason).await?)
    }

    /// The limits, those of templates among them, and what of each is used.
    ///
    /// # Errors
    /// [`ClientError::Store`] if the database fails.
    pub async fn limits(&self, namespace: Option<&str>) -> Result<Vec<LimitUse>, ClientError> {
        Ok(flow::limits(&mut *self.pool.acquire().await?, namespace).await?)
    }

    /// Sends a signal to the task; the step that waits for it, now or later, completes with the payload.
    ///
    /// # Errors
    /// [`ClientError::NotFound`] if there is no such task. [`ClientError::Refused`] if it has ended, no step of it
    /// waits for this name, or the answer is not allowed. [`ClientError::Store`] if the database fails.
    pub async fn signal(
        &self,
        task: Uuid,
        name: &str,
        payload: &Value,
        actor: Option<&str>,
    ) -> Result<(), ClientError> {
        let mut headers = HashMap::new();
        inject_current(&mut headers);
        let mut conn = tx::live(&self.pool).await?;
        let traceparent = headers.get(TRACEPARENT).map(String::as_str);
        accepted(task, signals::send(&mut conn, task, name, payload, actor, traceparent).await?)
    }
}
