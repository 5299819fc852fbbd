//! A lock that somebody else holds in an open transaction costs what it is about, and nobody else:
//! no shared loop waits for it longer than a few seconds, and what it was about is done when it is free.

use std::str::FromStr as _;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, Connection as _, Executor as _};
use tasker_orchestration::retention::{self, Removed};
use tasker_shared::metrics::{OfSource, metrics};
use tasker_shared::store::tx::{self, PoolOptions};
use tasker_tests::worker::{Answer, Claim};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::harness::{Setup, World, eventually};
use crate::retention::{age, keep_a_week};

/// The longest that a task of somebody else may take beyond its own time: what one turn of a loop may
/// spend on locks, twice, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(9);
const SLEEP: Duration = Duration::from_secs(2);

/// A session of a role that may work in the namespace `tests`, as the documents grant it, and leaves
/// its transactions open.
struct Stranger {
    session: PgConnection,
    role: String,
}

impl Stranger {
    async fn of(world: &World) -> Self {
        let role = format!("stranger_{}", Uuid::new_v4().simple());
        let grants = format!(
            "create role {role} login; grant usage on schema tasker to {role};
             grant execute on function tasker.worker_hello, tasker.worker_bye, tasker.claim_steps, tasker.heartbeat,
               tasker.report_results, tasker.submit_task, tasker.set_limit, tasker.pause_schedule to {role};
             insert into tasker.role_namespaces values ('{role}', 'tests')"
        );
        world.pool.execute(AssertSqlSafe(grants)).await.expect("the grants");
        let options =
            PgConnectOptions::from_str(&world.url).expect("a url").username(&role).application_name("a stranger");
        Self { session: PgConnection::connect_with(&options).await.expect("a session"), role }
    }

    /// Calls a function in a transaction that stays open.
    async fn call(&mut self, call: &str) {
        self.session.execute("begin").await.expect("begun");
        self.session.execute(AssertSqlSafe(format!("select tasker.{call}"))).await.expect("called");
    }

    async fn heartbeat(&mut self, claim: &Claim) {
        let claims = json!([{"step": claim.step, "token": claim.token}]);
        self.call(&format!("heartbeat('{claims}')")).await;
    }

    async fn end(mut self, world: &World, how: &str) {
        self.session.execute(AssertSqlSafe(how.to_owned())).await.expect("ended");
        self.session.close().await.expect("closed");
        let role = &self.role;
        world.pool.execute(AssertSqlSafe(format!("drop owned by {role}; drop role {role}"))).await.expect("tidied up");
    }
}

/// What was put off for a lock in this process, which other tests share.
fn put_off(source: &'static str) -> u64 {
    metrics().lock_put_offs.of(&OfSource { source }).get()
}

/// A task of another namespace is submitted, sleeps and ends, while somebody holds a lock of ours.
async fn others_go_on(world: &World) {
    world.register_as("elsewhere", "nap", "1", "steps: [{name: a, wait: {sleep: 2s}}]").await;
    let began = Instant::now();
    let task = world.submit_with(json!({"namespace": "elsewhere", "template": "nap"})).await.expect("submitted");
    assert_eq!(world.finish_within(&[task], SLEEP + PATIENCE).await, ["complete"]);
    println!("a sleep of 2 s of another namespace took {:?}", began.elapsed());
}

/// People are shown the holder, and since when.
async fn is_shown(world: &World, stranger: &Stranger) {
    let shown: Option<(String, String, bool)> = sqlx::query_as(
        "select user_name, application_name, since < clock_timestamp() - interval '1 s' from tasker.lock_holders() where user_name = $1",
    )
    .bind(&stranger.role)
    .fetch_optional(&world.pool)
    .await
    .expect("the holders");
    assert_eq!(shown, Some((stranger.role.clone(), "a stranger".into(), true)));
}

async fn cancel(world: &World, task: Uuid) {
    let query = sqlx::query_scalar("select tasker.cancel_task(task => $1, reason => 'no need', actor => 'ada')");
    let said: String = query.bind(task).fetch_one(&world.pool).await.expect("asked");
    assert_eq!(said, "accepted");
}

/// The next claim, as the worker `hand`, of this task.
async fn claim_of(world: &World, claims: &mut Vec<Claim>, task: Uuid) -> Claim {
    loop {
        if let Some(place) = claims.iter().position(|claim| claim.task == task) {
            return claims.swap_remove(place);
        }
        claims.push(world.claim().await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_left_open_holds_up_no_timer_of_others() {
    let world = World::start(Setup::by_hand()).await;
    world.register("leased", "steps: [{name: a, handler: ok, timeouts: {heartbeat: 1s}}]").await;
    let (beaten, reported) = (world.submit("leased").await, world.submit("leased").await);
    let mut claims = Vec::new();
    let (first, second) = (claim_of(&world, &mut claims, beaten).await, claim_of(&world, &mut claims, reported).await);
    let before = put_off("due");
    let (mut beating, mut reporting) = (Stranger::of(&world).await, Stranger::of(&world).await);
    beating.heartbeat(&first).await;
    let result = json!([{"step": second.step, "token": second.token, "outcome": "success", "output": {}}]);
    reporting.call(&format!("report_results('{result}')")).await;
    // Both leases end while their steps are held.
    others_go_on(&world).await;
    assert!(put_off("due") > before, "it is counted");
    is_shown(&world, &beating).await;
    // What was held is settled when it is free: one report counts, one lease has ended.
    beating.end(&world, "rollback").await;
    reporting.end(&world, "commit").await;
    assert_eq!(world.finish(&[reported]).await, ["complete"]);
    let again = claim_of(&world, &mut claims, beaten).await;
    assert_eq!(again.attempt, 2);
    world.succeed(&again).await;
    assert_eq!(world.finish(&[beaten]).await, ["complete"]);
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_task_whose_step_is_held_waits_alone() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("two", "a: ok\nb: ok").await;
    let (held, free, claimed) = (world.submit("two").await, world.submit("two").await, world.submit("two").await);
    let mut claims = Vec::new();
    let claim = claim_of(&world, &mut claims, held).await;
    for task in [held, held, free, free] {
        if task != held || claims.iter().filter(|claim| claim.task == held).count() == 0 {
            claims.push(world.claim().await);
        }
    }
    let mut stranger = Stranger::of(&world).await;
    stranger.heartbeat(&claim).await;
    let mut taking = Stranger::of(&world).await;
    taking.call("claim_steps('tests', null, 'a stranger', '{ok}', 100)").await;
    let before = put_off("task_requests");
    for task in [held, free, claimed] {
        cancel(&world, task).await;
    }
    assert_eq!(world.finish_within(&[free], PATIENCE).await, ["cancelled"]);
    others_go_on(&world).await;
    assert!(put_off("task_requests") > before, "it is counted");
    assert_eq!(world.of_task(held, "finished_at is null").await.as_deref(), Some("true"));
    stranger.end(&world, "commit").await;
    taking.end(&world, "rollback").await;
    assert_eq!(world.finish_within(&[held, claimed], PATIENCE).await, ["cancelled", "cancelled"]);
    assert_eq!(world.number("select count(*) from tasker.audit where action = 'cancel'").await, 3);
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_submit_left_open_on_a_key_holds_up_no_request_of_others() {
    let world = World::start(Setup::default()).await;
    world.register_steps("one", "a: ok").await;
    let (mut kept, mut undone) = (Stranger::of(&world).await, Stranger::of(&world).await);
    kept.call("submit_task('tests', 'one', idempotency_key => 'kept')").await;
    undone.call("submit_task('tests', 'one', idempotency_key => 'undone')").await;
    let before = put_off("task_requests");
    for key in [Some("kept"), Some("undone"), None] {
        let request =
            json!({"v": 1, "type": "submit", "namespace": "tests", "template": "one", "idempotency_key": key});
        world.send("task_requests", &request, None).await;
    }
    eventually("the one without a key has run", async || {
        (world.number("select count(*) from tasker.tasks where state = 'complete'").await == 1).then_some(())
    })
    .await;
    others_go_on(&world).await;
    assert!(put_off("task_requests") > before, "it is counted");
    is_shown(&world, &kept).await;
    kept.end(&world, "commit").await;
    undone.end(&world, "rollback").await;
    eventually("each key has its task, once", async || {
        let ended = "select idempotency_key from tasker.tasks where state = 'complete' and namespace = 'tests' order by 1 nulls last";
        let keys: Vec<Option<String>> = sqlx::query_scalar(ended).fetch_all(&world.pool).await.expect("tasks");
        (keys == [Some("kept".into()), Some("undone".into()), None]).then_some(())
    })
    .await;
    world.queues_drained().await;
    assert_eq!(world.number("select count(*) from tasker.quarantine").await, 0);
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_requests_that_are_locked_leaves_others_their_turn() {
    let world = World::start(Setup::default()).await;
    world.register_steps("one", "a: ok").await;
    let mut stranger = Stranger::of(&world).await;
    stranger.call("submit_task('tests', 'one', idempotency_key => 'key-' || n) from generate_series(1, 300) n").await;
    let send = "select pgmq.send('task_requests', jsonb_build_object('v', 1, 'type', 'submit', 'namespace', 'tests', 'template', 'one',
        'idempotency_key', 'key-' || n)) from generate_series(1, 300) n";
    sqlx::query(send).execute(&world.pool).await.expect("sent");
    for _ in 0..3 {
        others_go_on(&world).await;
    }
    stranger.end(&world, "rollback").await;
    eventually("each key has its task", async || {
        (world.number("select count(*) from tasker.tasks where state = 'complete' and namespace = 'tests'").await
            == 300)
            .then_some(())
    })
    .await;
    assert_eq!(world.number("select count(*) from tasker.quarantine").await, 0);
    world.assert_complete().await;
    world.end().await;
}

/// Every settle of a task whose pending step an operator's session has locked meets that lock where
/// nothing is skipped: in the statement that writes.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_locked_by_hand_costs_its_own_task_only() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("chain", "a: ok\nb: ok <- a").await;
    let mut tasks = Vec::new();
    let mut claims = Vec::new();
    for _ in 0..6 {
        tasks.push(world.submit("chain").await);
        claims.push(world.claim().await);
    }
    let mut session = PgConnection::connect(&world.url).await.expect("a session");
    session.execute("begin").await.expect("begun");
    let lock = "select from tasker.steps where step_index = 1 and task_uuid = any($1) for update";
    sqlx::query(lock).bind(&tasks[2..4]).execute(&mut session).await.expect("locked");
    let before = put_off("step_results");
    let results: Vec<Value> = claims
        .iter()
        .map(|claim| tasker_tests::worker::result(claim, &Answer::Success(json!({}))).expect("a result"))
        .collect();
    world.report_raw(&results).await;
    for claim in claims.iter().filter(|claim| !tasks[2..4].contains(&claim.task)) {
        world.until_step(claim.step, &["complete"]).await;
    }
    others_go_on(&world).await;
    assert!(put_off("step_results") > before, "it is counted");
    session.close().await.expect("closed");
    for _ in 0..6 {
        let claim = world.claim().await;
        world.succeed(&claim).await;
    }
    assert_eq!(world.finish(&tasks).await, ["complete"; 6]);
    assert_eq!(world.number("select count(*) from tasker.quarantine").await, 0);
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_is_locked_by_hand_is_put_off_and_counted() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("one", "a: ok").await;
    let task = world.submit("one").await;
    let claim = world.claim().await;
    let mut session = PgConnection::connect(&world.url).await.expect("a session");
    session.execute("begin").await.expect("begun");
    sqlx::query("select from tasker.tasks where task_uuid = $1 for update")
        .bind(task)
        .execute(&mut session)
        .await
        .expect("locked");
    let before = put_off("step_results");
    world.report(&claim, &Answer::Success(json!({}))).await;
    others_go_on(&world).await;
    eventually("it is counted", async || (put_off("step_results") > before).then_some(())).await;
    session.close().await.expect("closed");
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rows_of_a_dead_worker_that_a_stranger_holds_hide_no_other_death() {
    let world = World::start(Setup { orchestrators: 1, ..Setup::by_hand() }).await;
    world.register("leased", "steps: [{name: a, handler: ok, timeouts: {heartbeat: 1h}}]").await;
    // Two workers without a session, so that their locks are free.
    let mut claims = Vec::new();
    for (worker, key) in [("aaa", 7001), ("zzz", 7002)] {
        world.submit("leased").await;
        claims.push(world.claim_as(worker).await);
        let hello = "select tasker.worker_hello($1, 'tests', '{worker_tests}', '{ok}', 0, $2)";
        sqlx::query(hello).bind(worker).bind(i64::from(key)).execute(&world.pool).await.expect("hello");
        // The first is never looked at before both are there.
        if worker == "aaa" {
            sqlx::query("update tasker.workers set seen_at = 'epoch' where worker = 'aaa'")
                .execute(&world.pool)
                .await
                .expect("old");
        }
    }
    let mut stranger = Stranger::of(&world).await;
    stranger.heartbeat(&claims[0]).await;
    let mut owner = PgConnection::connect(&world.url).await.expect("a session");
    sqlx::query("update tasker.workers set seen_at = clock_timestamp() where worker = 'aaa'")
        .execute(&world.pool)
        .await
        .expect("new");
    owner.execute("begin; select from tasker.workers where worker = 'aaa' for update").await.expect("locked");
    // The second is found dead though the first cannot be looked into.
    world.until_step(claims[1].step, &["enqueued"]).await;
    others_go_on(&world).await;
    owner.close().await.expect("closed");
    stranger.end(&world, "rollback").await;
    world.until_step(claims[0].step, &["enqueued"]).await;
    for _ in 0..2 {
        let claim = world.claim().await;
        assert_eq!(claim.attempt, 2);
        world.succeed(&claim).await;
    }
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_that_is_being_changed_holds_up_its_own_steps_only() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("one", "a: ok").await;
    world.register_steps("flaky", "a: flaky").await;
    sqlx::query("select tasker.set_limit('tests', 'ok', 1)").execute(&world.pool).await.expect("set");
    eventually("the limit is known", async || {
        let task = world.submit("one").await;
        cancel(&world, task).await;
        world.finish(&[task]).await;
        (world.number("select count(*) from tasker.transitions where detail->>'held_by' = 'limit' or detail->>'waiting' = 'limit'
            or detail::text like '%limit%'").await > 0).then_some(())
    })
    .await;
    // Steps under a limit are let in by the one loop that would wait.
    sqlx::query("select tasker.set_limit('tests', 'flaky', 1)").execute(&world.pool).await.expect("set");
    let mut stranger = Stranger::of(&world).await;
    stranger.call("set_limit('tests', 'ok', 2)").await;
    let held = world.submit("one").await;
    eventually("it is held", async || {
        (world.number("select count(*) from tasker.steps where held_by = 'limit'").await > 0).then_some(())
    })
    .await;
    for _ in 0..3 {
        let other = world.submit("flaky").await;
        let claim = world.claim().await;
        assert_eq!(claim.task, other);
        world.succeed(&claim).await;
    }
    others_go_on(&world).await;
    stranger.end(&world, "commit").await;
    let claim = world.claim().await;
    assert_eq!(claim.task, held);
    world.succeed(&claim).await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_with_a_wrong_token_locks_nothing() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("one", "a: ok").await;
    let task = world.submit("one").await;
    let claim = world.claim().await;
    let mut stranger = Stranger::of(&world).await;
    stranger.heartbeat(&Claim { token: Uuid::new_v4(), ..claim.clone() }).await;
    let lock = "select from tasker.steps where step_uuid = $1 for no key update nowait";
    sqlx::query(lock).bind(claim.step).fetch_one(&world.pool).await.expect("nobody holds it");
    stranger.end(&world, "rollback").await;
    world.succeed(&claim).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_says_hello_for_ever_is_tidied_away_by_a_later_pass() {
    let world = World::start(Setup { orchestrators: 0, workers: 0, ..Setup::default() }).await;
    for name in ["held", "free"] {
        world.hello(name, None, &["ok"], 1).await;
    }
    let old = "update tasker.workers set seen_at = seen_at - interval '2 h', role_name = null";
    world.pool.execute(old).await.expect("aged");
    let mut stranger = Stranger::of(&world).await;
    stranger.call("worker_hello('held', 'tests', '{worker_tests}', '{ok}', 1)").await;
    let tidy = "set lock_timeout = '1s'; select tasker.tidy(1000)";
    world.pool.execute(tidy).await.expect("nobody waits");
    assert_eq!(world.words("select worker from tasker.workers").await, ["held"]);
    stranger.end(&world, "rollback").await;
    world.pool.execute(tidy).await.expect("tidied");
    assert_eq!(world.words("select worker from tasker.workers").await, Vec::<String>::new());
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_leaves_what_somebody_holds_for_another_pass() {
    let world = World::start(Setup::default()).await;
    world.register_steps("one", "a: ok").await;
    let tasks = [world.submit("one").await, world.submit("one").await];
    assert_eq!(world.finish(&tasks).await, ["complete", "complete"]);
    world.assert_complete().await;
    let old = age(&world, &tasks, 30).await;
    keep_a_week(&world, false).await;
    let mut session = PgConnection::connect(&world.url).await.expect("a session");
    session.execute("begin").await.expect("begun");
    let lock = "select from tasker.steps where task_uuid = $1 for update";
    sqlx::query(lock).bind(old[0]).execute(&mut session).await.expect("locked");
    // As an orchestrator's are.
    let options = PoolOptions { settings: &[("lock_timeout", "1s")], ..PoolOptions::default() };
    let pool = tx::pool(&world.url, &options).await.expect("a pool");
    let pass = async || retention::pass(&pool, None, Duration::ZERO, &CancellationToken::new()).await.expect("a pass");
    assert_eq!(pass().await, Removed { put_off: 1, ..Removed::default() });
    session.close().await.expect("closed");
    assert_eq!(pass().await, Removed { tasks: 2, ..Removed::default() });
    pool.close().await;
    world.end().await;
}

async fn schedule(world: &World, namespace: &str, name: &str) {
    let set = "select tasker.set_schedule(namespace => $1, name => $2, template => 'nothing', every => interval '1 h')";
    sqlx::query(set).bind(namespace).bind(name).execute(&world.pool).await.expect("set");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_that_is_held_or_whose_key_is_misses_its_own_tick_only() {
    let world = World::start(Setup::by_hand()).await;
    for namespace in ["tests", "elsewhere"] {
        world.register_as(namespace, "nothing", "1", "steps: [{name: a, wait: {sleep: 1ms}}]").await;
    }
    for (namespace, name) in [("tests", "held"), ("tests", "keyed"), ("elsewhere", "free")] {
        schedule(&world, namespace, name).await;
    }
    eventually("every schedule is planned", async || {
        (world.number("select count(*) from tasker.schedules where not planned").await == 0).then_some(())
    })
    .await;
    // All tick at one time, two seconds from now.
    sqlx::query("update tasker.schedules set next_at = date_trunc('second', clock_timestamp()) + interval '2 s'")
        .execute(&world.pool)
        .await
        .expect("moved");
    sqlx::query("insert into tasker.due (due_at, kind) select distinct next_at, 'schedule' from tasker.schedules; ")
        .execute(&world.pool)
        .await
        .expect("due");
    let key: String = sqlx::query_scalar(
        "select format('schedule/%s/tick/%s', schedule_uuid, to_char(next_at at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'))
         from tasker.schedules where name = 'keyed'",
    )
    .fetch_one(&world.pool)
    .await
    .expect("a key");
    let (mut pausing, mut keying) = (Stranger::of(&world).await, Stranger::of(&world).await);
    pausing.call("pause_schedule('tests', 'held')").await;
    keying.call(&format!("submit_task('tests', 'nothing', idempotency_key => '{key}')")).await;
    sqlx::query("select pg_notify('tasker', 'due')").execute(&world.pool).await.expect("told");
    let runs = "select string_agg(name || ' ' || runs, ', ' order by name) from tasker.schedules";
    eventually("the free one has run", async || (world.words(runs).await == ["free 1, held 0, keyed 0"]).then_some(()))
        .await;
    others_go_on(&world).await;
    pausing.end(&world, "rollback").await;
    keying.end(&world, "rollback").await;
    eventually("each has run once", async || (world.words(runs).await == ["free 1, held 1, keyed 1"]).then_some(()))
        .await;
    let tasks: Vec<Uuid> =
        sqlx::query_scalar("select last_task from tasker.schedules").fetch_all(&world.pool).await.expect("tasks");
    assert_eq!(world.finish(&tasks).await, ["complete"; 3]);
    world.assert_complete().await;
    world.end().await;
}

/// The shape of this week's parts of the log and of those `weeks` later.
async fn shape(world: &World, table: &str) -> Vec<String> {
    let query = "
        select format('%s %s %s %s', a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attstorage)
        from pg_attribute a where a.attrelid = to_regclass($1) and a.attnum > 0 and not a.attisdropped
        union all
        select format('%s %s', regexp_replace(pg_get_indexdef(i.indexrelid), '_[0-9]{8}', '', 'g'), (i.indisvalid, i.indisprimary,
          (select c.relname from pg_inherits h join pg_class c on c.oid = h.inhparent where h.inhrelid = i.indexrelid)))
        from pg_index i where i.indrelid = to_regclass($1)
        union all
        select format('%s %s %s %s', c.relispartition, c.reloptions, c.relpersistence, c.relreplident) from pg_class c where c.oid = to_regclass($1)
        union all
        select format('%s %s', regexp_replace(k.conname, '_[0-9]{8}', ''), pg_get_constraintdef(k.oid)) from pg_constraint k
        where k.conrelid = to_regclass($1) and k.contype <> 'n'
        order by 1";
    sqlx::query_scalar(query).bind(table).fetch_all(&world.pool).await.expect("the catalog")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_gets_its_next_week_beside_a_long_dump_and_nobody_waits() {
    let world = World::start(Setup::default()).await;
    world.register_steps("two", "a: ok\nb: ok <- a").await;
    let week = |n: i32| {
        format!(
            "to_char((date_trunc('week', clock_timestamp() at time zone 'UTC') + interval '{n} weeks'), '\"_\"YYYYMMDD')"
        )
    };
    let name = async |n: i32| -> String {
        sqlx::query_scalar(AssertSqlSafe(format!("select {}", week(n)))).fetch_one(&world.pool).await.expect("a name")
    };
    let (old, new) = (name(4).await, name(5).await);
    let mut dump = PgConnection::connect(&world.url).await.expect("a session");
    // As pg_dump does: every table, until it is through.
    dump.execute(
        "begin; lock table tasker.transitions, tasker.attempts, tasker.transitions_default, tasker.attempts_default in access share mode",
    )
    .await
    .expect("locked");
    let mut slowest = Duration::ZERO;
    let making = async {
        for _ in 0..20 {
            let made: i32 =
                sqlx::query_scalar("select tasker.ensure_partitions(5)").fetch_one(&world.pool).await.expect("tried");
            assert_eq!(made, -1, "the lock of the dump is in the way");
        }
    };
    let running = async {
        for _ in 0..20 {
            let began = Instant::now();
            let task = world.submit("two").await;
            assert_eq!(world.finish(&[task]).await, ["complete"]);
            slowest = slowest.max(began.elapsed());
        }
    };
    tokio::join!(making, running);
    println!("beside the dump the slowest of 20 tasks took {slowest:?}");
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");
    dump.close().await.expect("closed");
    let made: i32 =
        sqlx::query_scalar("select tasker.ensure_partitions(5)").fetch_one(&world.pool).await.expect("made");
    assert_eq!(made, 1);
    for table in ["transitions", "attempts"] {
        let (made_old, made_new) = (
            shape(&world, &format!("tasker.{table}{old}")).await,
            shape(&world, &format!("tasker.{table}{new}")).await,
        );
        assert!(made_old.len() > 10, "{made_old:#?}");
        assert_eq!(made_old, made_new);
    }
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn free_locks_right_after_a_promotion_end_no_claim() {
    let world = World::start(Setup { orchestrators: 0, ..Setup::by_hand() }).await;
    let look = async |suspects: &[&str]| -> Vec<(Option<String>, bool)> {
        sqlx::query_as("select worker, dead from tasker.look_for_dead_workers($1, array_fill(7001::bigint, array[cardinality($1)]))")
            .bind(suspects)
            .fetch_all(&world.pool)
            .await
            .expect("looked")
    };
    let hello = async || {
        let hello = "select tasker.worker_hello('far', 'tests', '{worker_tests}', '{ok}', 1, 7001)";
        sqlx::query(hello).execute(&world.pool).await.expect("hello");
    };
    hello().await;
    sqlx::query("insert into tasker.due (due_at, kind, worker, step_uuids) values (clock_timestamp() + interval '1 h', 'lease', 'far', '{}')")
        .execute(&world.pool)
        .await
        .expect("a claim");
    assert_eq!(look(&[]).await, [(Some("far".into()), false)], "its lock is free");
    // What this server has remembered is of the timeline before: it is a standby that was promoted.
    sqlx::query("update tasker.timeline set timeline = '000000FF'").execute(&world.pool).await.expect("changed");
    assert_eq!(look(&["far"]).await, [(None, false)], "it has not had the time to come back");
    assert_eq!(look(&["far"]).await, [(None, false)], "nor a moment later");
    hello().await;
    assert_eq!(look(&[]).await, [(Some("far".into()), false)]);
    assert_eq!(look(&["far"]).await, [(Some("far".into()), true)], "it said hello, and its lock is free");
    world.end().await;
}
