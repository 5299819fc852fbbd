//! What is done costs what it touches: an ended task leaves no timer, and nothing that runs again and
//! again reads what is finished, held or asleep row by row.

use std::collections::HashMap;

use serde_json::json;
use sqlx::{AssertSqlSafe, Executor, PgConnection};
use tasker_api::gauges::oldest_rows;
use tasker_orchestration::lifecycle::admission;
use tasker_orchestration::retention::statements as retention;
use tasker_shared::store::tx::{self, PoolOptions};
use tasker_shared::store::{HOT_PATH_SETTINGS, details, views};
use tasker_testing::TestDatabase;
use tasker_tests::worker::Answer;
use uuid::Uuid;

use crate::harness::{Setup, World, eventually};

async fn ask(world: &World, call: &str, task: Uuid) {
    let query = sqlx::query_scalar(AssertSqlSafe(format!("select tasker.{call}")));
    let said: String = query.bind(task).fetch_one(&world.pool).await.expect("asked");
    assert_eq!(said, "accepted", "{call}");
}

/// What is due, claims aside, as `kind count`.
async fn due(world: &World) -> Vec<String> {
    world
        .words(
            "select format('%s %s', kind, count(*)) from tasker.due where kind <> 'lease' group by kind order by kind",
        )
        .await
}

async fn until_steps(world: &World, task: Uuid, wanted: &[&str]) {
    eventually(&format!("steps are {wanted:?}"), async || (world.steps(task).await == wanted).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ended_task_leaves_no_timer_however_it_ends() {
    let world = World::start(Setup::by_hand()).await;
    world
        .register(
            "timed",
            "timeouts: {total: 2d}
steps:
  - {name: a, handler: ok, timeouts: {queue: 1h, total: 1d}}
  - {name: b, handler: broken, depends_on: [a], retry: {max_attempts: 3, initial_interval: 1h, max_interval: 1h}}
  - {name: nap, wait: {sleep: 2d}}
  - {name: wish, wait: {signal: go, timeout: 2d}}",
        )
        .await;
    let running = ["a: complete", "b: waiting_for_retry", "nap: waiting", "wish: waiting"];
    for (end, state) in [
        ("cancel_task($1)", "cancelled"),
        ("cancel_task($1, terminate => true)", "cancelled"),
        ("complete_step($1, 'b')", "complete"),
        ("fail", "error"),
    ] {
        let task = world.submit("timed").await;
        let a = world.claim().await;
        world.succeed(&a).await;
        let b = world.claim().await;
        world.report(&b, &Answer::Error("Hiccup", true)).await;
        until_steps(&world, task, &running).await;
        assert_eq!(due(&world).await, ["retry 1", "timer 2", "total_timeout 1"], "what came of a is over");
        match end {
            "complete_step($1, 'b')" => {
                ask(&world, end, task).await;
                ask(&world, "skip_step($1, 'nap')", task).await;
                ask(&world, "signal_task($1, 'go')", task).await;
            }
            "fail" => {
                for _ in 0..2 {
                    for statement in [
                        "update tasker.steps set due_at = clock_timestamp() where state = 'waiting_for_retry'",
                        "update tasker.due set due_at = clock_timestamp() where kind = 'retry'",
                        "select pg_notify('tasker', 'due')",
                    ] {
                        sqlx::query(statement).execute(&world.pool).await.expect("it is due");
                    }
                    let b = world.claim().await;
                    world.report(&b, &Answer::Error("Hiccup", true)).await;
                    world.until_step(b.step, &["waiting_for_retry", "error"]).await;
                }
            }
            _ => ask(&world, end, task).await,
        }
        assert_eq!(world.finish(&[task]).await, [state], "{end}");
        assert_eq!(due(&world).await, [""; 0], "{end}");
        world.assert_sound().await;
    }
    // One that has not begun, and one that is held.
    world.register_steps("one", "a: ok").await;
    world.register("held", "steps: [{name: a, handler: nobody.offers.this, timeouts: {queue: 1d}}]").await;
    let later = "select tasker.submit_task('tests', 'one', run_at => clock_timestamp() + interval '2 d')";
    let later: Uuid = sqlx::query_scalar(later).fetch_one(&world.pool).await.expect("submitted");
    let held = world.submit("held").await;
    eventually("it is held", async || (due(&world).await == ["queue_timeout 1", "start 1"]).then_some(())).await;
    ask(&world, "cancel_task($1)", later).await;
    ask(&world, "cancel_task($1)", held).await;
    assert_eq!(world.finish(&[later, held]).await, ["cancelled", "cancelled"]);
    assert_eq!(due(&world).await, [""; 0]);
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hints_that_an_older_release_left_are_removed_and_others_stay() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("two", "a: ok\nb: ok <- a").await;
    world.register("naps", "timeouts: {total: 2d}\nsteps: [{name: nap, wait: {sleep: 2d}}]").await;
    let [ended, open, asleep] = [world.submit("two").await, world.submit("two").await, world.submit("naps").await];
    until_steps(&world, asleep, &["nap: waiting"]).await;
    let mut claims = Vec::new();
    while world.of_task(ended, "state").await.as_deref() != Some("complete") {
        let claim = world.claim().await;
        if claim.task == ended {
            world.succeed(&claim).await;
        } else {
            claims.push(claim);
        }
    }
    world.succeed(&claims.remove(0)).await;
    let kept = due(&world).await;
    assert_eq!(kept, ["timer 1", "total_timeout 1"]);
    let left = "insert into tasker.due (due_at, kind, task_uuid, step_uuids)
        select clock_timestamp() + interval '2 d', k, $1, null::uuid[] from unnest('{retry,signal,total_timeout}'::text[]) k
        union all select clock_timestamp() + interval '2 d', k, gen_random_uuid(), null from unnest('{retry,start}'::text[]) k
        union all select clock_timestamp() + interval '2 d', k, $2, array(select step_uuid from tasker.steps where task_uuid = $2 and state = 'complete')
          from unnest('{queue_timeout,step_timeout}'::text[]) k";
    sqlx::query(left).bind(ended).bind(open).execute(&world.pool).await.expect("left");
    let mut conn = world.pool.acquire().await.expect("a connection");
    assert_eq!(retention::forget_due(&mut conn).await.expect("tidied"), 7);
    assert_eq!(due(&world).await, kept);
    world.assert_sound().await;
    drop(conn);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_live_step_does_not_hide_a_dead_one() {
    let world = World::start(Setup::by_hand()).await;
    world.register("pair", "steps: [{name: dead, handler: ok}, {name: nap, wait: {sleep: 2d}}]").await;
    world.register("naps", "steps: [{name: nap, wait: {sleep: 2d}}, {name: b, handler: ok, depends_on: [nap]}]").await;
    let [task, asleep] = [world.submit("pair").await, world.submit("naps").await];
    until_steps(&world, task, &["dead: enqueued", "nap: waiting"]).await;
    until_steps(&world, asleep, &["nap: waiting", "b: pending"]).await;
    world.assert_sound().await;
    let stuck = "select task_uuid || ': ' || why from tasker.stuck_tasks() order by 1";
    let token = "no message, claim, due time or declared wait";

    sqlx::query("delete from pgmq.q_worker_tests").execute(&world.pool).await.expect("lost");
    assert_eq!(world.words(stuck).await, [format!("{task}: step dead is enqueued, and there is {token}")]);
    // A message of another attempt does not move this one, and a timeout only ends it.
    let step: Uuid = sqlx::query_scalar("select step_uuid from tasker.steps where task_uuid = $1 and step_index = 0")
        .bind(task)
        .fetch_one(&world.pool)
        .await
        .expect("a step");
    let message = json!({"v": 1, "task": task, "step": step, "generation": 1, "attempt": 7, "handler": "nobody"});
    world.send("worker_tests", &message, None).await;
    for kind in ["step_timeout", "queue_timeout"] {
        sqlx::query("insert into tasker.due (due_at, kind, task_uuid, step_uuids) values (clock_timestamp() + interval '1 d', $1, $2, array[$3])")
            .bind(kind)
            .bind(task)
            .bind(step)
            .execute(&world.pool)
            .await
            .expect("a hint");
    }
    assert_eq!(world.words(stuck).await.len(), 1);
    sqlx::query("delete from tasker.due where kind <> 'timer'").execute(&world.pool).await.expect("they were no help");
    // Whoever repairs it sends its message again.
    let message = json!({"v": 1, "task": task, "step": step, "generation": 1, "attempt": 1, "handler": "ok"});
    world.send("worker_tests", &message, None).await;
    world.assert_sound().await;
    let claim = world.claim().await;
    assert_eq!(claim.step, step);
    world.assert_sound().await;
    sqlx::query("delete from tasker.due where kind = 'lease'").execute(&world.pool).await.expect("lost");
    assert_eq!(world.words(stuck).await, [format!("{task}: step dead is in_progress, and there is {token}")]);
    world.succeed(&claim).await;
    world.assert_sound().await;
    // A step whose dependencies are all done, and that nobody sent.
    sqlx::query("update tasker.steps set remaining_dependencies = 0 where task_uuid = $1 and state = 'pending'")
        .bind(asleep)
        .execute(&world.pool)
        .await
        .expect("forgotten");
    assert_eq!(world.words(stuck).await, [format!("{asleep}: step b is pending, and there is {token}")]);
    sqlx::query("update tasker.steps set remaining_dependencies = 1 where task_uuid = $1 and state = 'pending'")
        .bind(asleep)
        .execute(&world.pool)
        .await
        .expect("put right");
    world.assert_sound().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn worker_row_of_no_use_costs_nobody_else_and_is_shown() {
    let world = World::start(Setup { orchestrators: 0, ..Setup::by_hand() }).await;
    // As they may stand there from before there were checks.
    let checks = "do $$ declare v text; begin
        for v in select conname from pg_constraint where conrelid = 'tasker.workers'::regclass and contype = 'c' loop
          execute format('alter table tasker.workers drop constraint %I', v);
        end loop; end $$";
    sqlx::query(checks).execute(&world.pool).await.expect("no checks");
    sqlx::query(
        "insert into tasker.workers (worker, namespace, queues, handlers, slots) values
           ('negative', 'shop', '{worker_shop}', '{x}', -1), ('without handlers', 'shop', '{worker_shop}', '{}', 5),
           ('of nulls', 'shop', '{null}', '{null}', 5), ('thief', 'shop', '{step_results,task_requests}', '{}', 0),
           ('thief too', 'shop', '{step_results}', '{ok}', 0), ('abroad', 'shop', '{worker_tests}', '{ok}', 2147483647),
           ('lost', 'shop', '{worker_shop__nowhere}', '{ok}', 5), ('huge', 'tests', '{worker_tests}', '{ok,null}', 2147483647)",
    )
    .execute(&world.pool)
    .await
    .expect("rows");
    sqlx::query("select tasker.create_queue('worker_shop')").execute(&world.pool).await.expect("a queue");
    let step = json!({"v": 1, "task": Uuid::new_v4(), "step": Uuid::new_v4(), "attempt": 1, "handler": "ok"});
    for queue in ["step_results", "task_requests"] {
        world.send(queue, &step, None).await;
        let old = format!("update pgmq.q_{queue} set enqueued_at = clock_timestamp() - interval '1 h'");
        sqlx::query(AssertSqlSafe(old)).execute(&world.pool).await.expect("old");
    }
    let mut conn = world.pool.acquire().await.expect("a connection");
    let room: Vec<(String, i64)> = admission::room(&mut conn)
        .await
        .expect("it is no reason to fail")
        .into_iter()
        .map(|row| (row.queue, row.capacity))
        .collect();
    // The worker `hand` has 100 slots; of one that says it has two thousand million 10,000 count.
    assert_eq!(room, [("worker_shop".to_owned(), 10), ("worker_tests".to_owned(), 20_200)]);
    for queue in ["step_results", "task_requests"] {
        sqlx::query(AssertSqlSafe(format!("select tasker.drop_dead_messages('{queue}', null, '1 s', 1000)")))
            .execute(&mut *conn)
            .await
            .expect("asked");
        let query = AssertSqlSafe(format!("select count(*) from pgmq.q_{queue}"));
        let left: i64 = sqlx::query_scalar(query).fetch_one(&mut *conn).await.expect("a count");
        assert_eq!(left, 1, "{queue}: what lies there is no step's message");
    }
    let shown: Vec<String> = details::workers(&mut conn, None)
        .await
        .expect("workers")
        .into_iter()
        .filter_map(|worker| Some(format!("{}: {}", worker.worker, worker.problem?)))
        .collect();
    assert_eq!(
        shown,
        [
            "abroad: queues: worker_tests is no queue of steps of namespace shop",
            "negative: slots: must be 0 at least, not -1",
            "of nulls: handlers: names none; it could run nothing",
            "thief: handlers: names none; it could run nothing",
            "thief too: queues: step_results is no queue of steps of namespace shop",
            "without handlers: handlers: names none; it could run nothing",
        ]
    );
    let live = views::live_workers(&mut conn).await.expect("workers");
    let unusable: i64 = live.iter().map(|live| live.unusable).sum();
    assert_eq!(unusable, 6);
    assert!(live.iter().all(|live| live.slots >= 0), "{live:?}");
    drop(conn);
    world.end().await;
}

/// Rows of each table that the session has read, by whatever way; within a transaction it only grows, but
/// it may begin with what the transactions before read.
async fn counts(conn: &mut PgConnection) -> HashMap<String, i64> {
    let rows: Vec<(String, i64)> = sqlx::query_as(
        "select c.relname::text, sum(pg_stat_get_xact_tuples_returned(r.oid) + pg_stat_get_xact_tuples_fetched(r.oid))::bigint
         from pg_class c cross join lateral (
           select c.oid union all select i.indexrelid from pg_index i where i.indrelid = c.oid) r
         where c.relnamespace = 'tasker'::regnamespace and c.relkind = 'r' group by 1",
    )
    .fetch_all(conn)
    .await
    .expect("statistics");
    rows.into_iter().collect()
}

/// What a transaction has read since this.
struct Reads(HashMap<String, i64>);

impl Reads {
    async fn begin(conn: &mut PgConnection) -> Self {
        Self(counts(conn).await)
    }

    async fn of(&self, conn: &mut PgConnection, table: &str) -> i64 {
        counts(conn).await[table] - self.0[table]
    }
}

const FINISHED: i64 = 5000;

/// A database with finished tasks of a step each that were submitted 20 days ago, one a second, and
/// nothing else; a connection of the orchestrator's kind.
async fn much_is_finished() -> (TestDatabase, sqlx::PgPool) {
    let database = TestDatabase::fresh().await;
    let options = PoolOptions { settings: HOT_PATH_SETTINGS, ..PoolOptions::default() };
    let pool = tx::pool(&database.url(), &options).await.expect("a pool");
    pool.execute(AssertSqlSafe(
        "select tasker.create_queue('worker_shop');
         insert into tasker.templates (namespace, name, version, definition) values ('shop', 'order', '1', '{\"steps\": [{}, {}]}');
         insert into tasker.template_steps select template_id, n, 's' || n, 'h' || n, 'worker_shop', 3, null, 10000
           from tasker.templates, generate_series(0, 1) n;
         create table public.made as select n, clock_timestamp() - interval '20 d' + n * interval '1 s' as at, gen_random_uuid() as step
           from generate_series(1, COUNT) n;
         alter table public.made add column task uuid;
         update public.made set task = encode(overlay(uuid_send(tasker.uuid7_floor(at)) placing substring(uuid_send(step) from 7) from 7), 'hex')::uuid;
         insert into tasker.tasks (task_uuid, namespace, template_id, state, version, correlation_id, trace_id, root_span_id, created_at,
             generation_began_at, last_at, finished_at, idempotency_key)
           select task, 'shop', (select template_id from tasker.templates), 'complete', 4, task::text, uuid_send(task),
             substring(uuid_send(task) from 1 for 8), at, at, at, at, 'key-' || n from public.made;
         insert into tasker.steps (step_uuid, task_uuid, step_index, queue, state, version, attempt, remaining_dependencies, last_at)
           select step, task, 0, 'worker_shop', 'complete', 4, 1, 0, at from public.made;
         insert into tasker.idempotency_keys select 'shop', 'key-' || n, task, '' from public.made"
            .replace("COUNT", &FINISHED.to_string())
            .as_str(),
    ))
    .await
    .expect("a data set");
    pool.execute("vacuum analyze tasker.tasks, tasker.steps, tasker.idempotency_keys").await.expect("known");
    (database, pool)
}

#[tokio::test(flavor = "multi_thread")]
async fn counts_of_queues_and_the_look_for_stuck_tasks_read_nothing_that_is_finished() {
    let (_database, pool) = much_is_finished().await;
    let mut tx = pool.begin().await.expect("a transaction");
    let reads = Reads::begin(&mut tx).await;
    let queues = views::queues(&mut tx).await.expect("queues");
    assert_eq!(queues.iter().map(|queue| queue.held).sum::<i64>(), 0);
    assert_eq!(reads.of(&mut tx, "steps").await, 0);
    oldest_rows(&mut tx).await.expect("rows");
    assert_eq!(retention::stuck_tasks(&mut tx).await.expect("looked"), 0);
    assert!(reads.of(&mut tx, "tasks").await <= 4);
    assert_eq!(reads.of(&mut tx, "steps").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_reads_each_expired_task_a_few_times_and_nothing_of_others() {
    let (_database, pool) = much_is_finished().await;
    sqlx::query("insert into tasker.retention (namespace, keep) values ('*', interval '1 d')")
        .execute(&pool)
        .await
        .expect("a policy");
    // A backlog of timers of others.
    sqlx::query("insert into tasker.due (due_at, kind, task_uuid) select clock_timestamp() + interval '9 d', 'timer', gen_random_uuid() from generate_series(1, 5000)")
        .execute(&pool)
        .await
        .expect("timers");
    let mut tx = pool.begin().await.expect("a transaction");
    let reads = Reads::begin(&mut tx).await;
    let mut found = Vec::new();
    let mut place = Some(retention::START);
    while let Some(here) = place {
        let more = retention::find(&mut tx, here, false).await.expect("found");
        found.extend(more.tasks);
        place = more.next;
    }
    assert_eq!(i64::try_from(found.len()).expect("a count"), FINISHED);
    // Index and table: each counts.
    let read = reads.of(&mut tx, "tasks").await;
    assert!(read <= 4 * FINISHED, "a dry run read {read} rows");
    drop(tx);
    // A policy of somebody else reads none of these.
    let mut tx = pool.begin().await.expect("a transaction");
    let reads = Reads::begin(&mut tx).await;
    tx.execute("update tasker.retention set namespace = 'other'").await.expect("a policy of another namespace");
    let none = retention::Found { tasks: Vec::new(), next: None };
    assert_eq!(retention::find(&mut tx, retention::START, false).await.expect("found"), none);
    assert_eq!(reads.of(&mut tx, "tasks").await, 0);
    drop(tx);

    let mut tx = pool.begin().await.expect("a transaction");
    let reads = Reads::begin(&mut tx).await;
    let some = retention::lock_tasks(&mut tx, &found[..50], false).await.expect("locked");
    assert_eq!(retention::remove(&mut tx, &some, &[]).await.expect("removed"), 50);
    for table in ["tasks", "steps", "idempotency_keys", "due", "signals", "children"] {
        let read = reads.of(&mut tx, table).await;
        assert!(read <= 50 * 20, "to remove 50 tasks {read} rows of {table} were read");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn admission_walks_over_nothing_that_no_worker_offers() {
    let (_database, pool) = much_is_finished().await;
    sqlx::query(
        "update tasker.steps set state = 'pending', held_by = 'worker', held_handler = 'h0', ready_at = clock_timestamp(), version = version + 1",
    )
    .execute(&pool)
    .await
    .expect("held");
    sqlx::query("select tasker.worker_hello('w', 'shop', '{worker_shop}', '{h1}', 10)")
        .execute(&pool)
        .await
        .expect("hello");
    pool.execute("vacuum analyze tasker.steps").await.expect("known");
    let mut tx = pool.begin().await.expect("a transaction");
    let reads = Reads::begin(&mut tx).await;
    let room = admission::room(&mut tx).await.expect("room");
    assert_eq!(room.iter().map(|row| (row.room, row.holding)).collect::<Vec<_>>(), [(20, false)]);
    assert!(admission::held_steps(&mut tx, "worker_shop", &["h1".to_owned()], 1000).await.expect("looked").is_empty());
    let read = reads.of(&mut tx, "steps").await;
    assert!(read <= 20, "{read} rows of held steps were read");
    // Whoever offers it is given the most urgent, and no more than it asks for is read.
    let held = admission::held_steps(&mut tx, "worker_shop", &["h0".to_owned()], 10).await.expect("looked");
    assert_eq!(held.len(), 10);
    assert!(reads.of(&mut tx, "steps").await <= 60);
    // Those that an older release holds are found, too.
    sqlx::query("update tasker.steps set held_handler = null where step_uuid = $1")
        .bind(held[0].step_uuid)
        .execute(&mut *tx)
        .await
        .expect("as an older release holds it");
    let again = admission::held_steps(&mut tx, "worker_shop", &["h0".to_owned()], 1).await.expect("looked");
    assert_eq!(again[0].step_uuid, held[0].step_uuid);
}
