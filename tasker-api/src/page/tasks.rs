//! The list of tasks, the search, and acts on many of them.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use axum::extract::Query;
use axum::response::Response;
use chrono::{DateTime, Utc};
use maud::{Markup, html};
use serde::Deserialize;
use serde_json::json;
use std::sync::Arc;
use tasker_shared::client::Submit;
use tasker_shared::redact;
use tasker_shared::state_machine::states::TaskState;
use tasker_shared::store::requests::{self, TaskRequest};
use tasker_shared::store::views::{self, TaskView};
use uuid::Uuid;

use super::rows::{self, CurrentStep, LATEST, Tally, TaskFilter};
use super::shell::{Section, command, empty};
use super::words::{self, STATUSES, count, counted, pill, when};
use super::{Form, Page, forbidden, may_read};
use crate::auth::Scope;
use crate::problem::Problem;

/// Tasks on one page.
const PAGE: usize = 50;
/// How old a list may be that many look at.
const LIST_GOOD_FOR: Duration = Duration::from_millis(1_200);
const TALLY_GOOD_FOR: Duration = Duration::from_secs(4);
const NAMES_GOOD_FOR: Duration = Duration::from_secs(15);

/// Rows of the list, and what each open task is at.
#[derive(Debug)]
pub(super) struct Listing {
    tasks: Vec<TaskView>,
    /// Before which task the next page begins.
    next: Option<Uuid>,
    current: HashMap<Uuid, CurrentStep>,
}

/// The query of a list.
#[derive(Debug, Default, Deserialize)]
pub(super) struct ListQuery {
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    template: String,
    #[serde(default)]
    status: String,
    #[serde(default)]
    correlation_id: String,
    #[serde(default)]
    error_type: String,
    #[serde(default)]
    before: String,
}

impl ListQuery {
    fn filter(&self) -> Result<TaskFilter, Problem> {
        let some = |text: &str| Some(text.trim()).filter(|text| !text.is_empty()).map(str::to_owned);
        if !self.status.is_empty() && !STATUSES.contains(&self.status.as_str()) {
            return Err(Problem::invalid("status", format!("must be one of {}", STATUSES.join(", "))));
        }
        let before = some(&self.before)
            .map(|text| text.parse().map_err(|_| Problem::invalid("before", "must be the id of a task")))
            .transpose()?;
        Ok(TaskFilter {
            namespace: some(&self.namespace),
            template: some(&self.template),
            status: some(&self.status),
            correlation_id: some(&self.correlation_id),
            error_type: some(&self.error_type),
            before,
        })
    }
}

/// The query string of a filter; empty for none.
fn query(filter: &TaskFilter, status: Option<&str>, before: Option<Uuid>) -> String {
    let mut text = form_urlencoded::Serializer::new(String::new());
    let before = before.map(|task| task.to_string());
    for (name, value) in [
        ("namespace", filter.namespace.as_deref()),
        ("template", filter.template.as_deref()),
        ("status", status),
        ("correlation_id", filter.correlation_id.as_deref()),
        ("error_type", filter.error_type.as_deref()),
        ("before", before.as_deref()),
    ] {
        if let Some(value) = value {
            text.append_pair(name, value);
        }
    }
    let text = text.finish();
    if text.is_empty() { text } else { format!("?{text}") }
}

/// `GET /`
pub(super) async fn list(page: Page, Query(params): Query<ListQuery>) -> Result<Response, Problem> {
    may_read(&page, Scope::TasksRead)?;
    let filter = params.filter()?;
    let visible = page.namespaces().map(<[String]>::to_vec);
    let now = page.memory.now(&page.state).await?;
    let listing =
        page.memory.listings.get((visible.clone(), filter.clone()), page.good_for(LIST_GOOD_FOR, 4), async || {
            let mut conn = page.database.conn().await?;
            let (tasks, next) = rows::tasks(&mut conn, page.namespaces(), &filter, PAGE).await?;
            let open: Vec<Uuid> = tasks.iter().filter(|task| !task.is_finished()).map(|task| task.task_uuid).collect();
            let current = if open.is_empty() { Vec::new() } else { rows::current_steps(&mut conn, &open).await? };
            Ok(Arc::new(Listing {
                tasks,
                next,
                current: current.into_iter().map(|step| (step.task_uuid, step)).collect(),
            }))
        });
    let listing = listing.await?;
    let tally = page.memory.tallies.get((visible.clone(), filter.namespace.clone()), TALLY_GOOD_FOR, async || {
        let mut conn = page.database.conn().await?;
        Ok(Arc::new(rows::tally(&mut conn, page.namespaces(), filter.namespace.as_deref()).await?))
    });
    let tally = tally.await?;
    let names = page.memory.names.get(visible, NAMES_GOOD_FOR, async || {
        Ok(Arc::new(rows::names(&mut *page.database.conn().await?, page.namespaces()).await?))
    });
    let names = names.await?;

    let body = html! {
        div.head {
            h1 { "Tasks" }
            span.grow {}
            (Page::live_button())
            (example_button(&page))
            @if !page.config().read_only && page.who.has(Scope::TasksSubmit) && !names.is_empty() {
                a.button.primary href=(page.link("/templates")) { "Submit a task" }
            }
        }
        (overview(&page, &filter, &tally))
        (filters(&page, &filter, &names))
        div.panel.flush id="list" data-live-part="" {
            @if let (true, Some(next)) = (listing.tasks.is_empty(), listing.next) {
                (further(&page, &filter, next))
            } @else if listing.tasks.is_empty() {
                (nothing(&page, &filter, &names))
            } @else {
                (table(&page, &listing, now, &filter))
            }
        }
    };
    Ok(page.show(now, "Tasks", Section::Tasks, Some(EVENTS), &body))
}

/// The stream of changes of all tasks.
const EVENTS: &str = "/v1/events";

fn overview(page: &Page, filter: &TaskFilter, tally: &[Tally]) -> Markup {
    let of = |status: &str| -> i64 {
        let is = |row: &&Tally| row.state.parse::<TaskState>().is_ok_and(|state| state.public_status() == status);
        tally.iter().filter(is).map(|row| row.count).sum()
    };
    let all: i64 = tally.iter().map(|row| row.count).sum();
    let capped = all >= LATEST;
    let ended = |failed: bool| -> i64 {
        let is =
            |row: &&Tally| row.minutes_ago.is_some() && (row.state == "error") == failed && row.state != "cancelled";
        tally.iter().filter(is).map(|row| row.count).sum()
    };
    let without = TaskFilter { before: None, ..filter.clone() };
    html! {
        div.panel id="overview" data-live-part="" {
            nav.chips aria-label="Status" {
                    a.chip href=(page.link(format!("/{}", query(&without, None, None)))) aria-current=[filter.status.is_none().then_some("true")] { "All " span.n { (count(all)) @if capped { "+" } } }
                    @for status in STATUSES {
                        a.chip href=(page.link(format!("/{}", query(&without, Some(status), None))))
                            aria-current=[(filter.status.as_deref() == Some(status)).then_some("true")] {
                            span.dot.(words::status(status).class) aria-hidden="true" {}
                            (status) " " span.n { (count(of(status))) }
                        }
                    }
            }
            div.pulse {
                div.tally {
                    div { b { (count(ended(false))) } span { "completed in the last hour" } }
                    div { b { (count(ended(true))) } span { "failed" } }
                }
                div.spark-box { (spark(tally)) }
            }
            @if capped { p.quiet.small { "Counts are of the latest " (count(LATEST)) " tasks." } }
        }
    }
}

/// Ended tasks a minute over the last hour, failures on top.
fn spark(tally: &[Tally]) -> Markup {
    let mut minutes: BTreeMap<i32, (i64, i64)> = BTreeMap::new();
    for row in tally {
        if let Some(minute) = row.minutes_ago.filter(|minute| (0..60).contains(minute)) {
            let (ok, bad) = minutes.entry(minute).or_default();
            *(if row.state == "error" { bad } else { ok }) += row.count;
        }
    }
    let most = minutes.values().map(|(ok, bad)| ok + bad).max().unwrap_or(0).max(1);
    let all: i64 = minutes.values().map(|(ok, bad)| ok + bad).sum();
    let bad: i64 = minutes.values().map(|(_, bad)| bad).sum();
    #[expect(clippy::cast_precision_loss, reason = "heights of a drawing")]
    let height = |n: i64| 40.0 * n as f64 / most as f64;
    html! {
        svg.spark viewBox="0 0 240 44" preserveAspectRatio="none" role="img"
            aria-label={ "Tasks that ended in each minute of the last hour: " (count(all)) ", of which " (count(bad)) " failed" } {
            line.base x1="0" y1="43.5" x2="240" y2="43.5" {}
            @for (minute, (ok, bad)) in &minutes {
                @let x = 236 - minute * 4;
                @let (ok_h, bad_h) = (height(*ok), height(*bad));
                rect.ok x=(x) y=(format!("{:.1}", 43.0 - ok_h)) width="3" height=(format!("{ok_h:.1}")) {
                    title { (counted(*ok, "task")) " ended " (minute) " min ago" }
                }
                @if *bad > 0 {
                    rect.bad x=(x) y=(format!("{:.1}", 43.0 - ok_h - bad_h)) width="3" height=(format!("{bad_h:.1}")) {
                        title { (count(*bad)) " failed " (minute) " min ago" }
                    }
                }
            }
        }
    }
}

fn filters(page: &Page, filter: &TaskFilter, names: &[(String, String)]) -> Markup {
    let mut namespaces: Vec<&str> = names.iter().map(|(namespace, _)| namespace.as_str()).collect();
    namespaces.dedup();
    let mut templates: Vec<&str> = names
        .iter()
        .filter(|(namespace, _)| filter.namespace.as_ref().is_none_or(|wanted| wanted == namespace))
        .map(|(_, name)| name.as_str())
        .collect();
    templates.sort_unstable();
    templates.dedup();
    let is_set = filter.namespace.is_some()
        || filter.template.is_some()
        || filter.correlation_id.is_some()
        || filter.error_type.is_some();
    html! {
        details.panel open[is_set] {
            summary { "Filter" @if is_set { " " span.quiet { "(active)" } } }
            form.filters method="get" action=(page.link("/")) {
                (select("namespace", "Namespace", &namespaces, filter.namespace.as_deref()))
                (select("template", "Template", &templates, filter.template.as_deref()))
                (select("status", "Status", &STATUSES, filter.status.as_deref()))
                label { "Correlation id" input type="text" name="correlation_id" value=[filter.correlation_id.as_ref()] maxlength="300"; }
                label { "Error type" input type="text" name="error_type" value=[filter.error_type.as_ref()] maxlength="300" placeholder="CardDeclined"; }
                button { "Apply" }
                @if is_set { a.button.plain href=(page.link("/")) { "Clear" } }
            }
        }
    }
}

fn select(name: &str, label: &str, values: &[&str], chosen: Option<&str>) -> Markup {
    html! {
        label { (label)
            select name=(name) {
                option value="" { "any" }
                @for value in values { option value=(value) selected[chosen == Some(value)] { (value) } }
                @if let Some(other) = chosen.filter(|chosen| !values.contains(chosen)) { option value=(other) selected { (other) } }
            }
        }
    }
}

fn example_button(page: &Page) -> Markup {
    let Some(example) = &page.config().example else {
        return html! {};
    };
    if !page.may_change(Scope::TasksSubmit, &example.namespace) {
        return html! {};
    }
    html! {
        form method="post" action=(page.link("/example")) { (page.csrf()) button { "▶ Run an example" } }
    }
}

/// What matches is so rare that a few quick looks did not meet it.
fn further(page: &Page, filter: &TaskFilter, next: Uuid) -> Markup {
    empty(
        "None among the latest",
        &html! {
            p { "None of the latest tasks matches this filter; older ones may." }
            a.button.primary rel="next" href=(page.link(format!("/{}", query(filter, filter.status.as_deref(), Some(next))))) { "Look further back" }
        },
    )
}

fn nothing(page: &Page, filter: &TaskFilter, names: &[(String, String)]) -> Markup {
    if *filter != TaskFilter::default() {
        return empty(
            "No task matches",
            &html! {
                p { "No task that you may see matches this filter." }
                a.button href=(page.link("/")) { "Show all tasks" }
            },
        );
    }
    if names.is_empty() {
        return empty(
            "No template yet",
            &html! {
                p { "Tasks are started from templates. Register one:" }
                (command("tasker template apply order.yaml"))
            },
        );
    }
    let (namespace, name) = &names[0];
    if page.config().example.as_ref().is_some_and(|one| page.may_change(Scope::TasksSubmit, &one.namespace)) {
        return empty(
            "No task yet",
            &html! {
                p { "Run the example and watch it move: an order is checked, charged and shipped in nine steps." }
                div.actions { (example_button(page)) a.button href=(page.link(format!("/templates/{namespace}/{name}"))) { "Fill in its form" } }
                p {}
                p { "From a terminal, 24 of them:" }
                (command("tasker demo"))
            },
        );
    }
    empty(
        "No task yet",
        &html! {
            p { "Submit the first one, here or from a terminal:" }
            (command(&format!("tasker task submit {namespace}/{name} --input '{{}}'")))
            div.actions { a.button.primary href=(page.link(format!("/templates/{namespace}/{name}"))) { "Fill in its form" } }
        },
    )
}

fn table(page: &Page, listing: &Listing, now: DateTime<Utc>, filter: &TaskFilter) -> Markup {
    let may_act = !page.config().read_only && page.who.has(Scope::TasksOperate);
    html! {
        form method="post" action=(page.link("/bulk")) {
            (page.csrf())
            input type="hidden" name="filter" value=(query(filter, filter.status.as_deref(), None));
            div.scroll {
                table.cards {
                    thead { tr {
                        @if may_act { th.tight { input.js-only id="pick-all" type="checkbox" aria-label="Select all tasks on this page"; } }
                        th { "Status" } th { "Task" } th { "At" } th.tight { "Attempts" } th { "Correlation id" } th.tight { "Created" } th.tight.num { "Took" }
                    } }
                    tbody { @for task in &listing.tasks { (row(page, task, listing.current.get(&task.task_uuid), now, may_act)) } }
                }
            }
            @if may_act {
                div.pick.idle {
                    span data-picked="" data-keep="" { "With the selected tasks:" }
                    select name="action" aria-label="What to do with the selected tasks" data-keep="" {
                        @for (action, name) in ACTIONS { option value=(action) { (name) } }
                    }
                    button name="scope" value="picked" { "Preview" }
                }
            }
            div.pages {
                @if filter.before.is_some() { a.button href=(page.link(format!("/{}", query(filter, filter.status.as_deref(), None)))) { "Newest" } }
                @if let Some(next) = listing.next { a.button rel="next" href=(page.link(format!("/{}", query(filter, filter.status.as_deref(), Some(next))))) { "Older" } }
            }
        }
    }
}

fn row(page: &Page, task: &TaskView, current: Option<&CurrentStep>, now: DateTime<Utc>, may_act: bool) -> Markup {
    let look = words::status(task.status);
    let link = page.link(format!("/tasks/{}", task.task_uuid));
    let attempts =
        current.filter(|step| step.failures > 0).map(|step| format!("{} of {}", step.failures + 1, step.max_attempts));
    let took = task.finished_at.unwrap_or(now) - task.created_at;
    html! {
        tr data-key=(task.task_uuid) {
            @if may_act { td.tight.full { input type="checkbox" name="task" value=(task.task_uuid) aria-label={ "Select task " (task.task_uuid) }; } }
            td.tight.bare data-label="Status" { span { (pill(look)) } }
            td.bare data-label="Task" { div {
                a.strong href=(link) data-row="" { (task.template) } " " span.quiet.small { (task.version) }
                span.sub { (task.namespace) " · " (short(task.task_uuid)) @if task.generation > 1 { " · run " (task.generation) } }
            } }
            td.why data-label="At" { div { (at(task, current, now)) } }
            td.tight data-label="Attempts" { @if let Some(attempts) = &attempts { span { (attempts) } } }
            td data-label="Correlation" { code { (words::clip(&task.correlation_id, 44)) } }
            td.tight data-label="Created" { span { (when(now, task.created_at)) } }
            td.tight.num data-label="Took" { span { (words::took(Some(took))) } }
        }
    }
}

/// The end of a task's id, which tells neighbours apart.
pub(super) fn short(task: Uuid) -> String {
    let text = task.simple().to_string();
    format!("…{}", &text[text.len() - 8..])
}

/// Where a task stands, in a few words.
fn at(task: &TaskView, current: Option<&CurrentStep>, now: DateTime<Utc>) -> Markup {
    if task.is_finished() {
        return html! {
            @if let Some(kind) = &task.error_type { code { (words::clip(kind, 60)) } " " }
            @if let Some(reason) = &task.reason { span.quiet { (words::clip(&redact::text(reason), 140)) } }
        };
    }
    if task.state == "pending" {
        return html! {
            @if let Some(at) = task.run_at.filter(|at| *at > now) { "starts " (when(now, at)) } @else { span.quiet { "not begun yet" } }
        };
    }
    let Some(step) = current else {
        return html! { span.quiet { "being evaluated" } };
    };
    let words = match (step.state.as_str(), step.held_by.as_deref()) {
        ("in_progress", _) => {
            html! { "running" @if let Some(worker) = &step.worker { " on " (words::clip(worker, 40)) } }
        }
        ("waiting_for_retry", None) => html! { "retry " @if let Some(due) = step.due_at { (when(now, due)) } },
        ("enqueued", _) => html! { "in its queue" },
        (_, Some("worker")) => html! { strong { "no worker offers " code { (step.handler) } } },
        (_, Some("room")) => html! { "waits for a free slot" },
        (_, Some("limit")) => html! { "held by a limit" },
        (_, Some("paused")) => html! { "its queue is paused" },
        ("waiting", _) => match (&step.signal, step.due_at) {
            (Some(signal), _) => html! { "waits for the signal " code { (signal) } },
            (None, Some(due)) => html! { "sleeps, wakes " (when(now, due)) },
            (None, None) => html! { "waits for its items or its task" },
        },
        ("error", _) => html! { "failed for good" },
        _ => html! { "result being evaluated" },
    };
    html! { span.strong { (step.name) } " " span.quiet { (words) } }
}

/// `GET /search`
pub(super) async fn search(page: Page, Query(params): Query<BTreeMap<String, String>>) -> Result<Response, Problem> {
    may_read(&page, Scope::TasksRead)?;
    let word = params.get("q").map(|word| word.trim()).unwrap_or_default();
    if word.len() > 1000 || word.contains('\0') {
        return Err(Problem::invalid("q", "must be an id or a key of at most 1000 bytes"));
    }
    let now = page.memory.now(&page.state).await?;
    let mut conn = page.database.conn().await?;
    let ids = if word.is_empty() { Vec::new() } else { rows::search(&mut conn, page.namespaces(), word).await? };
    if let [only] = ids.as_slice() {
        return Ok(super::see_other(&page.link(format!("/tasks/{only}"))));
    }
    let mut tasks = views::these(&mut conn, &ids).await?;
    tasks.sort_unstable_by_key(|task| std::cmp::Reverse(task.task_uuid));
    let current = rows::current_steps(&mut conn, &ids).await?;
    drop(conn);
    let listing =
        Listing { tasks, next: None, current: current.into_iter().map(|step| (step.task_uuid, step)).collect() };
    let body = html! {
        div.head { h1 { "Found for “" (words::clip(word, 80)) "”" } }
        div.panel.flush {
            @if listing.tasks.is_empty() {
                (empty("Nothing found", &html! {
                    p { "No task that you may see has this id, correlation id or idempotency key. They are compared as a whole, letter by letter." }
                    a.button href=(page.link("/")) { "Show all tasks" }
                }))
            } @else {
                (table(&page, &listing, now, &TaskFilter { correlation_id: Some(word.to_owned()), ..TaskFilter::default() }))
            }
        }
    };
    Ok(page.show(now, "Search", Section::Tasks, None, &body))
}

/// What may be done to many tasks, and how it is called.
const ACTIONS: [(&str, &str); 7] = [
    ("cancel", "Cancel"),
    ("terminate", "Terminate"),
    ("suspend", "Suspend"),
    ("resume", "Resume"),
    ("retry", "Retry"),
    ("give_up", "Give up"),
    ("resolve", "Resolve by hand"),
];

/// `POST /bulk`: shows what would happen; with `confirm`, does it.
pub(super) async fn bulk(form: Form) -> Result<Response, Problem> {
    let page = &form.page;
    page.who.require_scope(Scope::TasksOperate)?;
    let action = form.need("action")?;
    let Some((_, name)) = ACTIONS.iter().find(|(known, _)| *known == action) else {
        return Err(Problem::invalid("action", "must be one of those that the list offers"));
    };
    let mut picked = form
        .all("task")
        .map(|task| task.parse::<Uuid>().map_err(|_| Problem::invalid("task", "must be the id of a task")))
        .collect::<Result<Vec<_>, _>>()?;
    picked.sort_unstable();
    picked.dedup();
    if picked.is_empty() {
        return Err(Problem::invalid("task", "select at least one task in the list"));
    }
    if picked.len() > 500 {
        return Err(Problem::invalid("task", "at most 500 at once; use `tasker task cancel --status …` for more"));
    }
    let now = page.memory.now(&page.state).await?;
    let mut conn = page.database.conn().await?;
    let mut tasks = views::these(&mut conn, &picked).await?;
    tasks.retain(|task| page.who.reaches(&task.namespace));
    tasks.sort_unstable_by_key(|task| std::cmp::Reverse(task.task_uuid));
    let reason = form.get("reason");
    let confirmed = form.get("confirm").is_some();
    let mut rows = Vec::with_capacity(tasks.len());
    for task in &tasks {
        let answer = if confirmed {
            let actor = Some(page.who.name.as_str());
            match action {
                "cancel" | "terminate" => {
                    requests::cancel(&mut conn, task.task_uuid, action == "terminate", actor, reason).await?
                }
                "retry" => requests::retry(&mut conn, task.task_uuid, &[], actor, reason).await?,
                other => requests::act(&mut conn, task.task_uuid, act_of(other), actor, reason).await?,
            }
        } else {
            rows::act_problem(&mut conn, action, task.state).await?.unwrap_or_else(|| "accepted".into())
        };
        rows.push((task, answer));
    }
    drop(conn);
    let fits = rows.iter().filter(|(_, answer)| answer == "accepted").count();
    let back =
        page.link(format!("/{}", form.get("filter").filter(|filter| filter.starts_with('?')).unwrap_or_default()));
    let body = html! {
        div.head { h1 { @if confirmed { "Done: " } @else { "Preview: " } (name) " " (counted(rows.len(), "task")) } }
        div.panel {
            @if confirmed {
                p.reason { (counted(fits, "task")) " were asked to " (name.to_lowercase()) "." }
            } @else {
                p.reason { (count(fits)) " of " (counted(rows.len(), "task")) " would be asked to " (name.to_lowercase()) "; nothing has happened yet." }
            }
            div.actions {
                @if !confirmed && fits > 0 {
                    form method="post" action=(page.link("/bulk")) {
                        (page.csrf())
                        input type="hidden" name="action" value=(action);
                        input type="hidden" name="confirm" value="yes";
                        input type="hidden" name="filter" value=(form.get("filter").unwrap_or_default());
                        @for (task, answer) in &rows { @if answer == "accepted" { input type="hidden" name="task" value=(task.task_uuid); } }
                        input type="text" name="reason" aria-label="Reason, for the audit" placeholder="Reason, for the audit" maxlength="1000";
                        button.primary { (name) " " (counted(fits, "task")) }
                    }
                }
                a.button href=(back) { "Back to the list" }
            }
        }
        div.panel.flush { div.scroll { table.cards {
            thead { tr { th { "Status" } th { "Task" } th { "Correlation id" } th { @if confirmed { "Answer" } @else { "Would be" } } } }
            tbody { @for (task, answer) in &rows { tr {
                td.tight data-label="Status" { span { (pill(words::status(task.status))) } }
                td data-label="Task" { div { a href=(page.link(format!("/tasks/{}", task.task_uuid))) { (task.template) } span.sub { (task.namespace) " · " (short(task.task_uuid)) } } }
                td data-label="Correlation" { code { (words::clip(&task.correlation_id, 44)) } }
                td data-label=(if confirmed { "Answer" } else { "Would be" }) { span { @if answer == "accepted" { "✓ asked" } @else if words::status(task.status).ended { "not asked: it has already ended as " (task.status) } @else { "not asked: " (answer) } } }
            } } }
        } } }
    };
    Ok(page.show(now, "Many tasks", Section::Tasks, None, &body))
}

pub(super) fn act_of(word: &str) -> TaskRequest {
    match word {
        "suspend" => TaskRequest::Suspend,
        "resume" => TaskRequest::Resume,
        "give_up" => TaskRequest::GiveUp,
        _ => TaskRequest::Resolve,
    }
}

/// `POST /example`: submits one task of the example.
pub(super) async fn example(form: Form) -> Result<Response, Problem> {
    let page = &form.page;
    let Some(example) = &page.config().example else {
        return Err(Problem::not_found("example; `tasker up` brings one"));
    };
    page.who.require(Scope::TasksSubmit, &example.namespace)?;
    if example.inputs.is_empty() {
        return Err(forbidden("the example has no input"));
    }
    let place = usize::try_from(Utc::now().timestamp_millis()).unwrap_or_default() % example.inputs.len();
    let input = example.inputs.get(place).cloned().unwrap_or_else(|| json!({}));
    let task = page.state.client().submit(Submit::new(&example.namespace, &example.template, input)).await?;
    Ok(page.then(format!("/tasks/{task}"), "submitted"))
}
