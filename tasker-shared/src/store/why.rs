//! One sentence that says what a task waits for, or how it ended.
//!
//! [`situation`] reads the rows, [`Situation::sentence`] is pure. Neither decides anything.

use std::fmt::Write as _;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use uuid::Uuid;

use super::views::{self, TaskView};
use super::{Error, flow};
use crate::duration::in_words;
use crate::state_machine::flow::{GROUP_SEPARATOR, handler_limit, namespace_limit};

/// What the sentence is made from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Situation {
    /// The task.
    pub task: TaskView,
    /// The database's time of this look.
    pub now: DateTime<Utc>,
    /// Whether an orchestrator is connected to this database.
    pub orchestrator: bool,
    /// Its open steps in groups that wait for the same thing; the items of maps are among them.
    pub open: Vec<OpenSteps>,
    /// Its maps whose items have not all ended.
    pub maps: Vec<OpenMap>,
    /// What the first of its steps that wait for a task waits for, one level deep.
    pub awaited: Option<Box<Self>>,
    /// Of a suspended task: who suspended it, and why.
    pub suspended_by: Option<String>,
}

/// A map that waits for its items.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct OpenMap {
    /// The step's name.
    pub name: String,
    /// How many items its list has.
    pub items: i32,
    /// How many of them have ended.
    pub ended: i32,
    /// How many of those failed for good.
    pub failed: i32,
}

/// Steps of one state that wait for the same thing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct OpenSteps {
    /// The state that they share.
    pub state: String,
    /// What holds ready steps back: room, worker, limit or paused.
    pub held_by: Option<String>,
    /// Their queue.
    pub queue: String,
    /// Their handler.
    pub handler: String,
    /// How many.
    pub count: i64,
    /// Whether a live worker offers the handler on the queue.
    pub offered: bool,
    /// Who paused the queue and why, as `actor: reason`.
    pub paused: Option<String>,
    /// The hold group of the first one: `lane` of `tasker.steps`.
    #[serde(skip)]
    pub lane: Option<String>,
    /// Which limit lets nothing through now, where one holds them.
    pub limit: Option<String>,
    /// The first of them: the earliest due, or the longest in its state.
    pub name: String,
    /// Who holds the first one.
    pub worker: Option<String>,
    /// When the first one is due.
    pub due_at: Option<DateTime<Utc>>,
    /// Since when the first one has been in its state.
    pub since: DateTime<Utc>,
    /// Attempts of the first one in this generation that ended in an error.
    pub failures: i32,
    /// Attempts that its template allows.
    pub max_attempts: i32,
    /// The error of its latest attempt, as `type: message`.
    pub error: Option<String>,
    /// The signal that the first one waits for.
    pub waits_for: Option<String>,
    /// The answers that it takes, where not every signal will do.
    #[serde(skip)]
    pub allowed: Option<Vec<String>>,
    /// The task that the first one started and waits for.
    pub child_uuid: Option<Uuid>,
}

/// Looks at a task, and at the task that it waits for; `None` if there is no such task. Three
/// statements for each of them.
pub async fn situation(conn: &mut PgConnection, task_uuid: Uuid) -> Result<Option<Situation>, Error> {
    let Some(mut seen) = look(conn, task_uuid).await? else {
        return Ok(None);
    };
    if let Some(child) = seen.open.iter().find_map(|group| group.child_uuid) {
        seen.awaited = look(conn, child).await?.map(Box::new);
    }
    Ok(Some(seen))
}

async fn look(conn: &mut PgConnection, task_uuid: Uuid) -> Result<Option<Situation>, Error> {
    let Some(task) = views::these(conn, &[task_uuid]).await?.pop() else {
        return Ok(None);
    };
    let around = sqlx::query!(
        r#"select clock_timestamp() as "now!",
             exists (select from pg_stat_activity where datname = current_database() and application_name = 'tasker-orchestration')
             or exists (select from tasker.instances where seen_at > clock_timestamp() - interval '30 s') as "orchestrator!",
             case when $2 then (select concat_ws(': ', a.actor, a.reason) from tasker.audit a
               where a.task_uuid = $1 and a.action = 'suspend' order by a.audit_id desc limit 1) end as suspended_by"#,
        task_uuid,
        task.state == "suspended"
    )
    .fetch_one(&mut *conn)
    .await?;
    let mut open = sqlx::query_as!(
        OpenSteps,
        r#"select distinct on (g.place, g.state, g.held_by, g.queue, g.handler)
             g.state as "state!", g.held_by, g.queue as "queue!", g.handler as "handler!", g.name as "name!", g.worker, g.due_at,
             g.since as "since!", g.failures as "failures!", g.max_attempts as "max_attempts!", g.count as "count!",
             exists (select from tasker.workers w where g.queue = any(w.queues) and g.handler = any(w.handlers)
                       and w.seen_at > clock_timestamp() - interval '30 s') as "offered!",
             (select concat_ws(': ', p.actor, p.reason) from tasker.paused_queues p where p.queue = g.queue) as paused,
             g.lane, null::text as "limit",
             (select concat_ws(': ', a.error->>'type', a.error->>'message') from tasker.attempts a
              where a.task_uuid = $1 and a.step_uuid = g.step_uuid and a.attempt = g.attempt and a.error is not null) as error,
             case when g.state = 'waiting' then (select p.definition->'steps'->g.step_index->'wait'->'signal'->>'name'
               from tasker.templates p where p.template_id = g.template_id) end as waits_for,
             case when g.state = 'waiting' then (select array(select jsonb_array_elements_text(
                 coalesce(p.definition->'steps'->g.step_index->'wait'->'signal'->'allowed', '[]')))
               from tasker.templates p where p.template_id = g.template_id) end as allowed,
             case when g.state = 'waiting' then (select c.child_uuid from tasker.children c
               where c.task_uuid = $1 and c.step_uuid = g.step_uuid and c.attempt = g.attempt) end as child_uuid
           from (
             select t.template_id, s.step_index, s.step_uuid, s.attempt, s.state, s.held_by, s.lane, d.queue, d.handler,
               d.name || case when s.item >= 0 then format('[%s]', s.item) else '' end as name, s.claimed_by as worker,
               s.due_at, coalesce(s.ready_at, s.last_at) as since, s.failures, d.max_attempts,
               count(*) over (partition by s.state, s.held_by, d.queue, d.handler) as count,
               case s.state when 'error' then 0 when 'in_progress' then 1 when 'enqueued' then 2 when 'waiting_for_retry' then 4
                 when 'pending' then 5 else 3 end as place
             from tasker.tasks t
             join tasker.steps s on s.task_uuid = t.task_uuid
             join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
             where t.task_uuid = $1 and s.state not in ('complete', 'cancelled', 'skipped', 'resolved_manually')
               and (s.state <> 'pending' or s.held_by is not null)
               -- A map waits for nothing but its items, and they are here themselves.
               and not (s.state = 'waiting' and exists (select from tasker.maps m where m.task_uuid = s.task_uuid and m.step_uuid = s.step_uuid))
           ) g
           order by g.place, g.state, g.held_by, g.queue, g.handler, coalesce(g.due_at, g.since), g.name
           limit 1000"#,
        task_uuid
    )
    .fetch_all(&mut *conn)
    .await?;
    for group in open.iter_mut().filter(|group| group.held_by.as_deref() == Some("limit")) {
        group.limit = full_limit(conn, &task.namespace, group).await?;
    }
    let maps = sqlx::query_as!(
        OpenMap,
        r#"select d.name, m.items, m.items - m.remaining_items as "ended!", m.failed_items as failed
           from tasker.maps m
           join tasker.tasks t on t.task_uuid = m.task_uuid
           join tasker.steps s on s.step_uuid = m.step_uuid and s.state = 'waiting'
           join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
           where m.task_uuid = $1 order by s.step_index limit 1000"#,
        task_uuid
    )
    .fetch_all(conn)
    .await?;
    Ok(Some(Situation {
        task,
        now: around.now,
        orchestrator: around.orchestrator,
        open,
        maps,
        awaited: None,
        suspended_by: around.suspended_by,
    }))
}

/// The first limit of the hold group that lets nothing through now, in words.
async fn full_limit(conn: &mut PgConnection, namespace: &str, group: &OpenSteps) -> Result<Option<String>, Error> {
    let of_group = group.lane.as_deref().unwrap_or_default().split(GROUP_SEPARATOR).skip(2).map(str::to_owned);
    let names =
        of_group.chain([namespace_limit(namespace), handler_limit(namespace, &group.handler)]).collect::<Vec<_>>();
    Ok(flow::limit_use(conn, &names).await?.iter().find_map(flow::LimitUse::why))
}

impl Situation {
    /// As somebody may see it who does not reach every namespace or sees no payloads: `payloads` answers
    /// of a namespace whether its payloads may be seen, or nothing if it is out of reach. Of a task out
    /// of reach only its uuid is left; of an error whose words are hidden, its type.
    #[must_use]
    pub fn seen_by(mut self, payloads: &dyn Fn(&str) -> Option<bool>) -> Self {
        if payloads(&self.task.namespace) != Some(true) {
            for group in &mut self.open {
                if let Some(error) = &mut group.error {
                    error.truncate(error.find(": ").unwrap_or(error.len()));
                }
            }
        }
        let awaited = self.awaited.take().filter(|awaited| payloads(&awaited.task.namespace).is_some());
        self.awaited = awaited.map(|awaited| Box::new(awaited.seen_by(payloads)));
        self
    }

    /// The public status, a colon, and the reason.
    pub fn sentence(&self) -> String {
        format!("{}: {}", self.task.status, self.reason())
    }

    fn reason(&self) -> String {
        let task = &self.task;
        let reason = || task.reason.clone().filter(|reason| !reason.is_empty());
        match task.state {
            "complete" => format!("every step is done; it took {}", self.took()),
            "resolved_manually" => reason().unwrap_or_else(|| "resolved by hand".into()),
            "error" => {
                let kind = task.error_type.as_deref().map_or_else(String::new, |kind| format!(" ({kind})"));
                format!("{}{kind}", reason().unwrap_or_else(|| "no reason was recorded".into()))
            }
            "cancelled" => reason().unwrap_or_else(|| "no reason was given".into()),
            "suspended" => {
                let failed = reason().map_or_else(String::new, |reason| format!(" (meanwhile: {reason})"));
                let task = task.task_uuid;
                let who = self.suspended_by.as_deref().unwrap_or("an operator");
                format!("suspended by {who}; `tasker task resume {task}` lets it go on{failed}")
            }
            "pending" => self.pending(),
            "blocked_by_failures" => self.blocked(),
            _ => self.open_steps(),
        }
    }

    fn pending(&self) -> String {
        match self.task.run_at {
            Some(at) if at > self.now => format!("it starts at {}", self.clock(at)),
            _ if self.orchestrator => "an orchestrator has not begun it yet".into(),
            _ => "no orchestrator is running; start one with `tasker orchestrator run`".into(),
        }
    }

    fn blocked(&self) -> String {
        let failed = self.open.iter().find(|group| group.state == "error");
        let what = failed.map_or_else(
            || self.task.reason.clone().unwrap_or_else(|| "a step failed for good".into()),
            |group| match (&group.error, &self.task.reason) {
                // What never ran has no error of its own.
                (None, Some(reason)) => reason.clone(),
                _ => format!("{} failed for good{}", group.name, with_error(group)),
            },
        );
        format!("{what}; `tasker task retry {}` tries again", self.task.task_uuid)
    }

    /// What is furthest along, and beside it the count of everything else that is open.
    fn open_steps(&self) -> String {
        let waits = self.task.status == "waiting";
        let retry =
            || self.open.iter().filter(|group| group.state == "waiting_for_retry").min_by_key(|group| group.due_at);
        let group = match self.task.state {
            "waiting_for_retry" => retry(),
            _ => None,
        };
        let Some(group) = group.or_else(|| self.open.iter().find(|group| !waits || group.state != "error")) else {
            return if self.orchestrator {
                "an orchestrator is about to look at it".into()
            } else {
                "no orchestrator is running; start one with `tasker orchestrator run`".into()
            };
        };
        let mut text = self.group(group);
        let shown =
            if group.state == "pending" || (group.state == "enqueued" && !group.offered) { group.count } else { 1 };
        let others: i64 = self.open.iter().map(|group| group.count).sum::<i64>() - shown;
        if others > 0 {
            let _ = write!(text, " (and {others} other open step{})", if others == 1 { "" } else { "s" });
        }
        for OpenMap { name, items, ended, failed } in &self.maps {
            let failed = if *failed > 0 { format!(", {failed} of them failed") } else { String::new() };
            let _ = write!(text, "; {name} has {ended} of {items} items behind it{failed}");
        }
        text
    }

    fn group(&self, group: &OpenSteps) -> String {
        let OpenSteps { name, queue, handler, max_attempts, .. } = group;
        let attempt = group.failures + 1;
        let since = in_words(self.now - group.since);
        let who = if group.count == 1 { format!("{name} needs") } else { format!("{} steps need", group.count) };
        match (group.state.as_str(), group.held_by.as_deref()) {
            ("in_progress", _) => {
                let worker = group.worker.as_deref().unwrap_or("an unknown worker");
                format!(
                    "{name} is in progress on worker {worker} ({since} so far), attempt {attempt} of {max_attempts}"
                )
            }
            ("pending" | "enqueued" | "waiting_for_retry", held)
                if group.paused.is_some() && (group.state == "enqueued" || held.is_some()) =>
            {
                let paused = group.paused.as_deref().unwrap_or_default();
                let what = if group.count == 1 { name.clone() } else { format!("{} steps", group.count) };
                format!("{what} held ({since} so far): queue {queue} is paused by {paused}")
            }
            ("pending" | "waiting_for_retry", Some("limit")) if !group.offered && group.limit.is_none() => {
                format!("{who} handler {handler}, and no worker offers it on queue {queue}")
            }
            ("pending" | "waiting_for_retry", Some("limit")) => {
                let what = if group.count == 1 { name.clone() } else { format!("{} steps", group.count) };
                let limit = group.limit.as_deref().unwrap_or("its limits let it through now, it is about to be sent");
                format!("{what} held ({since} so far): {limit}")
            }
            ("waiting_for_retry", Some(_)) => format!("the retry of {name} is about to be sent"),
            ("waiting_for_retry", None) => {
                let due = group.due_at.unwrap_or(self.now);
                let at = self.clock(due);
                let late = if due < self.now && !self.orchestrator { "; no orchestrator is running" } else { "" };
                format!("retry of {name} at {at}, attempt {attempt} of {max_attempts}{late}")
            }
            ("enqueued", _) if group.offered => {
                format!("{name} is in queue {queue} ({since} so far), attempt {attempt} of {max_attempts}")
            }
            ("enqueued", _) | ("pending", Some("worker")) => {
                if group.offered {
                    format!("{who} handler {handler} on queue {queue}, which a worker offers now")
                } else {
                    format!("{who} handler {handler}, and no worker offers it on queue {queue}")
                }
            }
            ("pending", Some("room")) => {
                format!("{who} room in queue {queue}: every slot of its workers is taken ({since} so far)")
            }
            ("pending", Some("paused")) => format!("{who} queue {queue}, which was paused until just now"),
            ("enqueued_for_orchestration" | "enqueued_as_error_for_orchestration", _) if self.orchestrator => {
                format!("the result of {name} is being evaluated")
            }
            ("enqueued_for_orchestration" | "enqueued_as_error_for_orchestration", _) => {
                format!("the result of {name} waits for an orchestrator; none is running")
            }
            ("waiting", _) => self.waiting(group),
            ("error", _) => format!("{name} failed for good{}", with_error(group)),
            (state, _) => format!("{name} is {state} ({since} so far)"),
        }
    }

    /// What a step without a handler waits for.
    fn waiting(&self, group: &OpenSteps) -> String {
        let (name, since) = (&group.name, in_words(self.now - group.since));
        let ends = group.due_at.map(|at| self.clock(at));
        let late = if group.due_at.is_some_and(|at| at < self.now) && !self.orchestrator {
            "; no orchestrator is running"
        } else {
            ""
        };
        if let Some(child) = group.child_uuid {
            let awaited = self.awaited.as_deref().filter(|awaited| awaited.task.task_uuid == child);
            return match awaited {
                Some(Self { task, .. }) if task.is_finished() => {
                    format!(
                        "{name} waited for task {child} of template {}, which has ended; that is being evaluated",
                        task.template
                    )
                }
                Some(awaited) => format!(
                    "{name} waits for task {child} of template {} ({since} so far); that is {}",
                    awaited.task.template,
                    awaited.sentence()
                ),
                None => format!("{name} waits for task {child} ({since} so far)"),
            };
        }
        match (&group.waits_for, ends) {
            (Some(signal), ends) => {
                let until = ends.map_or_else(String::new, |at| format!(", until {at}"));
                let task = self.task.task_uuid;
                let answer = match group.allowed.as_deref() {
                    Some(allowed) if !allowed.is_empty() => format!(" --answer {}", allowed.join("|")),
                    _ => String::new(),
                };
                format!(
                    "{name} waits for the signal {signal} ({since} so far){until}{late}; `tasker task signal {task} {signal}{answer}` sends it"
                )
            }
            (None, Some(at)) => format!("{name} sleeps until {at}{late}"),
            (None, None) => format!("{name} waits ({since} so far)"),
        }
    }

    fn took(&self) -> String {
        in_words(self.task.finished_at.unwrap_or(self.now) - self.task.created_at)
    }

    /// The time of day in UTC, with the date unless it is today.
    fn clock(&self, at: DateTime<Utc>) -> String {
        let format = if at.date_naive() == self.now.date_naive() { "%H:%M:%S UTC" } else { "%Y-%m-%d %H:%M:%S UTC" };
        at.format(format).to_string()
    }
}

fn with_error(group: &OpenSteps) -> String {
    group.error.as_deref().map_or_else(String::new, |error| format!(" with {error}"))
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;
    use sqlx::AssertSqlSafe;

    use super::*;
    use crate::store::{tasks, templates};
    use crate::template;
    use tasker_testing::TestDatabase;

    const TEMPLATE: &str = r#"
namespace: shop
name: order
version: "1"
steps:
  - {name: reserve, handler: stock.reserve}
  - {name: charge_card, handler: cards.charge, retry: {max_attempts: 5}}
  - {name: ship, handler: orders.ship, queue: slow}
"#;

    struct Shop {
        conn: PgConnection,
        task: Uuid,
        // Dropped last.
        _database: TestDatabase,
    }

    impl Shop {
        /// A task whose three steps are pending; nobody works on it.
        async fn new() -> Self {
            use sqlx::Connection as _;
            let database = TestDatabase::fresh().await;
            let mut conn = PgConnection::connect(&database.url()).await.unwrap();
            let checked = template::parse("order.yaml", TEMPLATE).unwrap();
            templates::register(&mut conn, &checked).await.unwrap();
            let request = serde_json::json!({"namespace": "shop", "template": "order"});
            let task = tasks::submit(&mut conn, &[request]).await.unwrap()[0].task_uuid.unwrap();
            let mut shop = Self { conn, task, _database: database };
            shop.sql(
                "insert into tasker.steps (step_uuid, task_uuid, step_index, queue, remaining_dependencies, last_at)
                 select gen_random_uuid(), t.task_uuid, d.step_index, d.queue, 0, clock_timestamp()
                 from tasker.tasks t join tasker.template_steps d using (template_id)",
            )
            .await;
            shop
        }

        async fn sql(&mut self, statement: &str) {
            sqlx::query(AssertSqlSafe(statement.to_owned())).execute(&mut self.conn).await.unwrap();
        }

        async fn task_is(&mut self, set: &str) {
            self.sql(&format!("update tasker.tasks set {set}")).await;
        }

        async fn step_is(&mut self, name: &str, set: &str) {
            self.sql(&format!(
                "update tasker.steps s set {set} from tasker.template_steps d where d.step_index = s.step_index and d.name = '{name}'"
            ))
            .await;
        }

        async fn sentence(&mut self) -> String {
            situation(&mut self.conn, self.task).await.unwrap().unwrap().sentence()
        }
    }

    #[tokio::test]
    async fn a_queued_task_says_that_nobody_runs() {
        let mut shop = Shop::new().await;
        assert_eq!(
            shop.sentence().await,
            "queued: no orchestrator is running; start one with `tasker orchestrator run`"
        );
        shop.sql("set application_name = 'tasker-orchestration'").await;
        assert_eq!(shop.sentence().await, "queued: an orchestrator has not begun it yet");
        shop.task_is("run_at = '2100-01-02 03:04:05Z'").await;
        assert_eq!(shop.sentence().await, "queued: it starts at 2100-01-02 03:04:05 UTC");
        assert!(situation(&mut shop.conn, Uuid::nil()).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_retry_says_which_attempt_comes_when() {
        let mut shop = Shop::new().await;
        shop.task_is("state = 'waiting_for_retry'").await;
        shop.step_is(
            "charge_card",
            "state = 'waiting_for_retry', attempt = 1, failures = 1, due_at = '2100-01-02 12:03:10Z'",
        )
        .await;
        assert_eq!(shop.sentence().await, "waiting: retry of charge_card at 2100-01-02 12:03:10 UTC, attempt 2 of 5");
        let mut seen = situation(&mut shop.conn, shop.task).await.unwrap().unwrap();
        seen.now = "2100-01-02T12:00:00Z".parse().unwrap();
        assert_eq!(seen.sentence(), "waiting: retry of charge_card at 12:03:10 UTC, attempt 2 of 5");
        seen.now = "2100-01-02T12:04:00Z".parse().unwrap();
        assert!(seen.sentence().ends_with("; no orchestrator is running"), "{}", seen.sentence());
    }

    #[tokio::test]
    async fn a_wait_says_what_would_end_it() {
        let mut shop = Shop::new().await;
        shop.task_is("state = 'waiting_for_dependencies', held_steps = 1").await;
        shop.step_is("ship", "state = 'waiting', attempt = 1, due_at = '2100-01-02 12:03:10Z'").await;
        assert_eq!(shop.sentence().await, "waiting: ship sleeps until 2100-01-02 12:03:10 UTC");
        let mut seen = situation(&mut shop.conn, shop.task).await.unwrap().unwrap();
        seen.now = seen.open[0].since + TimeDelta::seconds(3);
        seen.open[0].waits_for = Some("paid".into());
        seen.open[0].due_at = None;
        seen.open[0].allowed = Some(vec!["yes".into(), "no".into()]);
        let wanted = format!(
            "waiting: ship waits for the signal paid (3 s so far); `tasker task signal {} paid --answer yes|no` sends it",
            shop.task
        );
        assert_eq!(seen.sentence(), wanted);
        seen.open[0].allowed = None;
        let wanted = format!(
            "waiting: ship waits for the signal paid (3 s so far); `tasker task signal {} paid` sends it",
            shop.task
        );
        assert_eq!(seen.sentence(), wanted);
    }

    #[tokio::test]
    async fn a_running_step_says_who_has_it_since_when() {
        let mut shop = Shop::new().await;
        shop.task_is("state = 'steps_in_process', in_flight_steps = 2").await;
        let claimed = "state = 'in_progress', attempt = 1, claim_token = gen_random_uuid(), claimed_by = 'w1', lease_expires_at = now()";
        shop.step_is("reserve", claimed).await;
        shop.step_is("charge_card", "state = 'enqueued', attempt = 1").await;
        let mut seen = situation(&mut shop.conn, shop.task).await.unwrap().unwrap();
        seen.now = seen.open[0].since + TimeDelta::seconds(3);
        assert_eq!(
            seen.sentence(),
            "running: reserve is in progress on worker w1 (3 s so far), attempt 1 of 3 (and 1 other open step)"
        );
    }

    #[tokio::test]
    async fn steps_without_a_worker_say_which_handler_is_missing() {
        let mut shop = Shop::new().await;
        shop.task_is("state = 'waiting_for_dependencies', held_steps = 1").await;
        shop.step_is("ship", "held_by = 'worker', ready_at = now()").await;
        let wanted = "waiting: ship needs handler orders.ship, and no worker offers it on queue worker_shop__slow";
        assert_eq!(shop.sentence().await, wanted);
        let mut seen = situation(&mut shop.conn, shop.task).await.unwrap().unwrap();
        seen.open[0].count = 3;
        assert_eq!(seen.sentence(), wanted.replace("ship needs", "3 steps need"));
        shop.sql("select tasker.worker_hello('w1', 'shop', '{worker_shop__slow}', '{orders.ship}', 1)").await;
        assert!(shop.sentence().await.ends_with(", which a worker offers now"));
    }

    #[tokio::test]
    async fn an_end_says_how_it_came() {
        let mut shop = Shop::new().await;
        let now = "finished_at = created_at + interval '65 s'";
        shop.task_is(&format!("state = 'complete', {now}")).await;
        assert_eq!(shop.sentence().await, "completed: every step is done; it took 1 min 5 s");
        shop.task_is("state = 'error', error_type = 'CardDeclined', reason = 'step charge_card failed: no money'")
            .await;
        assert_eq!(shop.sentence().await, "failed: step charge_card failed: no money (CardDeclined)");
        shop.task_is("state = 'cancelled', reason = 'cancelled by ada'").await;
        assert_eq!(shop.sentence().await, "cancelled: cancelled by ada");
    }

    #[tokio::test]
    async fn a_blocked_task_says_what_failed_and_what_to_do() {
        let mut shop = Shop::new().await;
        shop.task_is("state = 'blocked_by_failures', failed_steps = 1").await;
        shop.step_is("charge_card", "state = 'error', attempt = 2").await;
        let task = shop.task;
        shop.task_is("reason = 'step charge_card failed: input reads nothing'").await;
        let wanted =
            format!("waiting: step charge_card failed: input reads nothing; `tasker task retry {task}` tries again");
        assert_eq!(shop.sentence().await, wanted, "what never ran has no error of its own");
        shop.sql(
            r#"insert into tasker.attempts (task_uuid, step_uuid, attempt, generation, claim_token, worker, claim_began_at, claimed_at, error)
               select task_uuid, step_uuid, attempt, 1, gen_random_uuid(), 'w1', now(), now(), '{"type": "CardDeclined", "message": "no money"}'
               from tasker.steps where state = 'error'"#,
        )
        .await;
        let wanted = format!(
            "waiting: charge_card failed for good with CardDeclined: no money; `tasker task retry {task}` tries again"
        );
        assert_eq!(shop.sentence().await, wanted);
    }
}
