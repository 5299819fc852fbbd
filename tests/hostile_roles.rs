//! What one role may do to another: a worker belongs to the role that made it, an act says what it is
//! about and who asked, and one bad item costs no batch.

use serde_json::json;
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};
use uuid::Uuid;

use crate::harness::{Setup, World, eventually};

/// The namespace that the stranger may use; everybody else works in `tests`.
pub const OTHER: &str = "other";

/// A role that may call every public function, in a namespace of its own.
pub struct Stranger {
    /// Its name.
    pub role: String,
    session: PgConnection,
}

impl Stranger {
    pub async fn of(world: &World, namespace: &str) -> Self {
        // Roles belong to the whole server.
        let role = format!("stranger_{}", Uuid::new_v4().simple());
        let script = format!(
            "create role {role}; grant usage on schema tasker to {role};
             do $$ declare f regprocedure; begin
               for f in select p.oid from pg_proc p where p.pronamespace = 'tasker'::regnamespace and p.prosecdef loop
                 execute format('grant execute on function %s to {role}', f);
               end loop;
             end $$;
             insert into tasker.role_namespaces (role_name, namespace) values ('{role}', '{namespace}');"
        );
        world.pool.execute(AssertSqlSafe(script)).await.expect("a role");
        let mut session = PgConnection::connect(&world.url).await.expect("a session");
        session.execute(AssertSqlSafe(format!("set session authorization {role}"))).await.expect("the role");
        Self { role, session }
    }

    /// The first column of the first row as text, or `SQLSTATE message`.
    pub async fn ask(&mut self, query: &str) -> Result<Option<String>, String> {
        ask(&mut self.session, query).await
    }

    pub async fn end(self, world: &World) {
        self.session.close().await.expect("closed");
        let script = format!("drop owned by {0}; drop role {0}", self.role);
        world.pool.execute(AssertSqlSafe(script)).await.expect("tidied up");
    }
}

pub async fn ask(session: &mut PgConnection, query: &str) -> Result<Option<String>, String> {
    let query = format!("select (select a::text from ({query}) a limit 1)");
    sqlx::query_scalar(AssertSqlSafe(query)).fetch_one(session).await.map_err(|error| {
        let error = error.as_database_error().expect("an answer of the database");
        format!("{} {}", error.code().unwrap_or_default(), error.message())
    })
}

/// Refused, with this SQLSTATE and a message that begins like this.
fn refused(answer: Result<Option<String>, String>, expected: &str) {
    let why = answer.expect_err("it must be refused");
    assert!(why.starts_with(expected), "{why:?} is not {expected:?}");
}

pub async fn other_namespace(world: &World) -> Uuid {
    world
        .register_as(
            OTHER,
            "mine",
            "1",
            "steps: [{name: a, handler: ok}, {name: b, wait: {signal: go}, depends_on: [a]}]",
        )
        .await;
    world.submit_with(json!({"namespace": OTHER, "template": "mine"})).await.expect("submitted")
}

#[tokio::test(flavor = "multi_thread")]
async fn worker_that_could_stop_everybody_is_refused() {
    let mut world = World::start(Setup::default()).await;
    world.register_steps("one", "a: ok").await;
    other_namespace(&world).await;
    let mut stranger = Stranger::of(&world, OTHER).await;
    for (arguments, expected) in [
        ("'{worker_other}', '{x}', -1", "22023 slots: must be from 0 to 100000"),
        ("'{worker_other}', '{x}', null", "22023 slots: must be from 0 to 100000"),
        ("'{worker_other}', '{}', 1", "22023 handlers: name from 1 to 10000"),
        ("'{worker_other}', null, 1", "22023 handlers: name from 1 to 10000"),
        ("'{worker_other}', '{x,null}', 1", "22023 handlers: must hold no null"),
        ("'{step_results}', '{x}', 0", "22023 queues: step_results is no queue of steps of namespace other"),
        ("'{task_requests}', '{x}', 0", "22023 queues: task_requests is no queue of steps of namespace other"),
        ("'{worker_tests}', '{x}', 0", "22023 queues: worker_tests is no queue of steps of namespace other"),
        ("'{worker_other,null}', '{x}', 0", "22023 queues: must hold no null"),
        ("'{}', '{x}', 0", "22023 queues: name from 1 to 100 queues"),
    ] {
        refused(stranger.ask(&format!("select tasker.worker_hello('w', 'other', {arguments})")).await, expected);
    }
    refused(stranger.ask("select tasker.worker_hello('', 'other', '{worker_other}', '{x}', 1)").await, "22023 worker:");
    refused(
        stranger.ask("select tasker.worker_hello('w', null, '{worker_other}', '{x}', 1)").await,
        "22023 namespace:",
    );
    let crowd = "insert into tasker.workers (worker, namespace, queues, handlers, slots)
        select 'w' || n, 'other', '{worker_other}', '{x}', 1 from generate_series(1, 10000) n";
    world.pool.execute(crowd).await.expect("a crowd");
    let one_more = "select tasker.worker_hello('w', 'other', '{worker_other}', '{x}', 1)";
    refused(stranger.ask(one_more).await, "22023 worker: namespace other has 10000 workers already");
    world.pool.execute("delete from tasker.workers where worker = 'w1'").await.expect("one less");
    // A queue that no template has asked for yet is nobody's mistake.
    let early = stranger.ask("select tasker.worker_hello('w', 'other', '{worker_other__later}', '{x}', 1)").await;
    assert!(early.is_ok(), "{early:?}");
    // Nobody else notices, and whoever begins now begins.
    world.add_orchestrator().await;
    let task = world.submit("one").await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    stranger.end(&world).await;
    world.assert_sound().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_worker_that_could_not_be_one_are_impossible() {
    let world = World::start(Setup::by_hand()).await;
    for (change, constraint) in [
        ("slots = -1", "workers_slots_are_few"),
        ("handlers = '{}'", "workers_handlers_are_names"),
        ("queues = '{step_results}'", "workers_queues_are_of_their_namespace"),
        ("queues = '{worker_shop}'", "workers_queues_are_of_their_namespace"),
        ("worker = ''", "workers_names_are_short"),
    ] {
        let update = format!("update tasker.workers set {change} where worker = 'hand'");
        let error = world.pool.execute(AssertSqlSafe(update)).await.expect_err(change);
        assert_eq!(error.as_database_error().and_then(|error| error.constraint()), Some(constraint));
    }
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn worker_of_another_role_is_not_to_be_spoken_for() {
    let world = World::start(Setup { workers: 0, ..Setup::default() }).await;
    world.register("slow", "steps: [{name: a, handler: ok, timeouts: {heartbeat: 30s}}]").await;
    // Both roles work in the same namespace.
    let (mut one, mut two) = (Stranger::of(&world, "tests").await, Stranger::of(&world, "tests").await);
    let hello = "select tasker.worker_hello('anna', 'tests', '{worker_tests}', '{ok}', 2)";
    one.ask(hello).await.expect("hello");
    one.ask(hello).await.expect("hello again");
    let task = world.submit("slow").await;
    let claimed = eventually("a claim for anna", async || {
        one.ask("select step from tasker.claim_steps('tests', null, 'anna', '{ok}', 1)").await.expect("claimed")
    })
    .await;
    let known = "select format('%s %s %s', worker, slots, lock_key) from tasker.workers
        union all select format('%s %s', queue, reader) from tasker.readers where queue like 'worker%' order by 1";
    let before = world.words(known).await;
    assert_eq!(before.len(), 2, "{before:?}");
    world.submit("slow").await;
    eventually("the next step is sent", async || {
        (world.number("select count(*) from pgmq.q_worker_tests").await == 1).then_some(())
    })
    .await;
    let name = "worker: anna is a worker of another role";
    for (call, expected) in [
        ("select tasker.worker_bye('anna')", format!("42501 {name}")),
        ("select tasker.worker_hello('anna', 'tests', '{worker_tests}', '{ok}', 2, 4711)", format!("42501 {name}")),
        ("select tasker.claim_steps('tests', null, 'anna', '{ok}', 1)", format!("42501 p_{name}")),
    ] {
        refused(two.ask(call).await, &expected);
    }
    refused(two.ask("select tasker.worker_bye(null)").await, "22023 worker: is missing");
    assert_eq!(world.words(known).await, before);
    assert_eq!(world.number("select count(*) from pgmq.q_worker_tests").await, 1, "nobody took it");
    assert_eq!(
        world
            .words("select step_uuid || ' ' || state || ' ' || attempt from tasker.steps where claimed_by = 'anna'")
            .await,
        [format!("{} in_progress 1", claimed.trim_matches(['(', ')']))],
    );
    // Whoever is gone leaves the name to those who work in the same namespace, under roles of their own.
    world.pool.execute("update tasker.workers set seen_at = seen_at - interval '31 s'").await.expect("silent");
    two.ask(hello).await.expect("a hello for the one that is gone");
    refused(one.ask("select tasker.worker_bye('anna')").await, &format!("42501 {name}"));
    // The owner may speak for everybody.
    world.pool.execute("select tasker.worker_bye('anna')").await.expect("bye");
    assert_eq!(world.number("select count(*) from tasker.workers").await, 0);
    world.pool.execute("select tasker.cancel_task(task_uuid) from tasker.tasks").await.expect("asked");
    world.finish(&[task]).await;
    one.end(&world).await;
    two.end(&world).await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bulk_act_says_which_tasks_or_touches_none() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("one", "a: ok").await;
    let task = world.submit("one").await;
    let claim = world.claim().await;
    let mut session = PgConnection::connect(&world.url).await.expect("a session");
    for (arguments, expected) in [
        ("null, 'cancel'", "22023 filter: must be a JSON object"),
        ("'[]', 'cancel'", "22023 filter: must be a JSON object"),
        ("'null', 'cancel'", "22023 filter: must be a JSON object"),
        ("'{\"namespace\": null}', 'cancel'", "22023 filter: namespace must be a text"),
        ("'{\"template\": \"\"}', 'cancel'", "22023 filter: template must be a text"),
        ("'{\"namespace\": [\"tests\"]}', 'cancel'", "22023 filter: namespace must be a text"),
        ("'{\"correlation_id\": 5}', 'cancel'", "22023 filter: correlation_id must be a text"),
        ("'{\"status\": null, \"template\": \"one\"}', 'cancel'", "22023 filter: status must be a text"),
        ("'{\"template\": \"one\", \"after\": null}', 'cancel'", "22023 filter: after must be"),
        ("'{\"template\": \"one\", \"after\": \"x\"}', 'cancel'", "22023 filter: after must be the uuid of a task"),
        ("'{\"after\": \"00000000-0000-0000-0000-000000000000\"}', 'cancel'", "22023 filter: must say which"),
        ("'{\"template\": \"one\"}', null", "22023 action: must be"),
    ] {
        let call = format!("select tasker.act_on_tasks({arguments}, p_dry_run => false)");
        refused(ask(&mut session, &call).await, expected);
    }
    for (more, expected) in [
        ("p_max => null", "22023 p_max: must be from 1 to 10000"),
        ("p_max => -1", "22023 p_max: must be from 1 to 10000"),
        ("p_max => 10001", "22023 p_max: must be from 1 to 10000"),
        ("p_dry_run => null", "22023 p_dry_run: must be true or false"),
    ] {
        let call = format!("select tasker.act_on_tasks('{{\"template\": \"one\"}}', 'cancel', {more})");
        refused(ask(&mut session, &call).await, expected);
    }
    assert_eq!(world.number("select count(*) from tasker.audit").await, 0);
    world.succeed(&claim).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    session.close().await.expect("closed");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn audit_names_the_role_beside_the_name_it_gives() {
    let world = World::start(Setup { workers: 0, ..Setup::default() }).await;
    let task = other_namespace(&world).await;
    let mut stranger = Stranger::of(&world, OTHER).await;
    let role = stranger.role.clone();
    for call in [
        "select tasker.pause_queue('worker_other', 'why', 'ceo')".to_owned(),
        "select tasker.set_limit('other', concurrency => 5, actor => E'c\\neo')".to_owned(),
        format!("select tasker.suspend_task('{task}', 'why', repeat('ceo', 1000))"),
        "select tasker.resume_queue('worker_other', actor => '')".to_owned(),
        format!("select tasker.remove_limit('other', actor => '{role}')"),
    ] {
        assert_eq!(stranger.ask(&call).await, Ok(Some("(accepted)".into())), "{call}");
    }
    let actors = async || {
        let actors: Vec<String> = sqlx::query_scalar("select actor from tasker.audit order by audit_id")
            .fetch_all(&world.pool)
            .await
            .expect("the audit");
        actors
    };
    eventually("the task is suspended", async || (actors().await.len() == 5).then_some(())).await;
    let (mut actors, beside) = (actors().await, format!(" (role {role})"));
    actors.sort_unstable();
    let mut expected = vec![
        format!("ceo{beside}"),
        format!("c eo{beside}"),
        format!("{}{beside}", &"ceo".repeat(100)[..100 - beside.len()]),
        role.clone(),
        role.clone(),
    ];
    expected.sort_unstable();
    assert_eq!(actors, expected);
    // The owner of the schema, which the API server connects as, says for whom it acts.
    let kept = sqlx::query_scalar::<_, String>("select tasker.pause_queue('worker_other', null, 'ann')");
    assert_eq!(kept.fetch_one(&world.pool).await.expect("asked"), "accepted");
    assert_eq!(world.words("select actor from tasker.audit order by audit_id desc limit 1").await, ["ann"]);
    stranger.end(&world).await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_item_of_a_batch_costs_only_itself() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("one", "a: ok").await;
    let tasks = [world.submit("one").await, world.submit("one").await];
    let claims = [world.claim().await, world.claim().await];
    let item = |place: usize, more: &str| {
        format!("{{\"step\": \"{}\", \"token\": \"{}\", {more}}}", claims[place].step, claims[place].token)
    };
    let deep = format!("{}{}", "[".repeat(2000), "]".repeat(2000));
    let rubbish = format!("null, 1, \"x\", [], {deep}, {{\"step\": null}}, {{\"step\": 5, \"token\": {{}}}}");
    let progress =
        "select coalesce(progress::text, '') from tasker.steps where state = 'in_progress' order by step_uuid = any(array(
           select step_uuid from tasker.steps order by step_uuid limit 1)) desc";
    // Progress that would break whoever reads it is not kept, the lease is.
    for bad in [deep.as_str(), "1e400", "-1e131071"] {
        let beats =
            format!("[{}, {rubbish}, {}]", item(0, &format!("\"progress\": {bad}")), item(1, "\"progress\": 7"));
        let answers: Vec<bool> = sqlx::query_scalar("select still_yours from tasker.heartbeat($1::text::jsonb)")
            .bind(beats)
            .fetch_all(&world.pool)
            .await
            .expect("a heartbeat");
        assert_eq!(answers, [true, false, false, false, false, false, false, false, true], "{bad:.40}");
        let mut kept = world.words(progress).await;
        kept.sort_unstable();
        assert_eq!(kept, ["", "7"], "{bad:.40}");
    }
    let reports = format!(
        "[{}, {rubbish}, {}]",
        item(
            0,
            "\"outcome\": \"success\", \"start_offset_ms\": 1e-400, \"run_ms\": 1e-16000, \"usage\": {\"tiny\": 1e-400, \"huge\": 1e308}"
        ),
        item(1, "\"outcome\": \"error\", \"error\": {\"retry_after_ms\": 1e-400}")
    );
    let answers: Vec<bool> = sqlx::query_scalar("select accepted from tasker.report_results($1::text::jsonb)")
        .bind(reports)
        .fetch_all(&world.pool)
        .await
        .expect("reported");
    assert_eq!(answers, [true, false, false, false, false, false, false, false, true]);
    // The second is tried again, at once.
    let again = world.claim().await;
    world.succeed(&again).await;
    assert_eq!(world.finish(&tasks).await, ["complete"; 2]);
    let mut conn = world.pool.acquire().await.expect("a connection");
    for task in tasks {
        tasker_shared::store::views::usage(&mut conn, task).await.expect("the usage");
    }
    for no_list in ["null", "'{}'", "'1'", "'null'"] {
        let expected = |name: &str| format!("22023 {name}: must be a JSON array");
        refused(ask(&mut conn, &format!("select tasker.heartbeat({no_list})")).await, &expected("p_claims"));
        refused(ask(&mut conn, &format!("select tasker.report_results({no_list})")).await, &expected("p_results"));
    }
    drop(conn);
    world.assert_complete().await;
    world.end().await;
}

// The matrix.
