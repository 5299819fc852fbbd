//! Schedules: each tick is one task with a trace of its own, whoever looks and however often.

use serde_json::{Value, json};
use tasker_shared::client::{Client, ClientError};
use tasker_shared::schedule::{Missed, Overlap, Schedule};
use uuid::Uuid;

use crate::harness::{Setup, World, eventually};

const NAMESPACE: &str = "tests";

fn hourly(name: &str) -> Schedule {
    Schedule { every: Some("1h".into()), ..Schedule::new(NAMESPACE, name, "one") }
}

async fn client(world: &World) -> Client {
    Client::connect(&world.url).await.expect("a client")
}

async fn until_planned(world: &World) {
    eventually("every schedule is planned", async || {
        (world.number("select count(*) from tasker.schedules where not planned").await == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_tick_is_one_task_with_two_orchestrators() {
    let world = World::start(Setup { orchestrators: 2, workers: 2, ..Setup::default() }).await;
    world.register_steps("one", "a: ok").await;
    let client = client(&world).await;
    for n in 0..30 {
        let schedule = Schedule {
            missed: Missed::RunAll,
            input: json!({"at": "${schedule.at}", "of": "${schedule.name}"}),
            ..hourly(&format!("every_{n}"))
        };
        assert_eq!(client.set_schedule(&schedule, None).await.expect("set"), "created");
    }
    until_planned(&world).await;
    // Six hours pass with nobody there, and all 30 are due at once.
    sqlx::query(
        "with gone as (update tasker.schedules set anchor_at = anchor_at - interval '10 h', next_at = next_at - interval '6 h')
         insert into tasker.due (due_at, kind) select clock_timestamp(), 'schedule' from generate_series(1, 30)",
    )
    .execute(&world.pool)
    .await
    .expect("time passes");
    sqlx::query("select pg_notify('tasker', 'due')").execute(&world.pool).await.expect("told");
    eventually("every tick has run", async || {
        (world.number("select sum(runs)::bigint from tasker.schedules").await == 180).then_some(())
    })
    .await;
    let tasks: Vec<Uuid> =
        sqlx::query_scalar("select task_uuid from tasker.tasks").fetch_all(&world.pool).await.expect("tasks");
    assert_eq!(world.finish(&tasks).await, vec!["complete"; 180]);
    for (what, count) in [
        ("a trace each", "select count(distinct trace_id) from tasker.tasks"),
        ("a correlation id each", "select count(distinct correlation_id) from tasker.tasks"),
        (
            "the tick in the input and in the correlation id",
            "select count(*) from tasker.tasks where correlation_id = format('tests/%s@%s', input->>'of', input->>'at')",
        ),
        (
            "the next tick planned",
            "select count(*) * 6 from tasker.schedules where next_at > clock_timestamp() and planned",
        ),
        (
            "a hint for the next tick of each",
            "select count(*) * 6 from tasker.schedules s where exists (select from tasker.due d where d.kind = 'schedule' and d.due_at <= s.next_at)",
        ),
    ] {
        assert_eq!(sqlx::query_scalar::<_, i64>(count).fetch_one(&world.pool).await.expect("a number"), 180, "{what}");
    }
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tick_while_the_last_task_is_open_does_as_the_policy_says() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("one", "a: ok").await;
    let client = client(&world).await;
    let name = (NAMESPACE, "busy");
    let set = async |overlap| {
        client.set_schedule(&Schedule { overlap, ..hourly("busy") }, Some("ada")).await.expect("set");
    };
    set(Overlap::Skip).await;
    let first = client.trigger_schedule(name, Some("ada"), Some("now, please")).await.expect("triggered");
    let skipped = client.trigger_schedule(name, None, None).await.unwrap_err();
    assert!(matches!(&skipped, ClientError::Refused(why) if why.contains("was skipped: task")), "{skipped}");

    set(Overlap::Allow).await;
    let beside = client.trigger_schedule(name, None, None).await.expect("triggered");
    assert_eq!(world.of_task(first, "finished_at").await, None);

    set(Overlap::CancelPrevious).await;
    let last = client.trigger_schedule(name, None, None).await.expect("triggered");
    assert_eq!(world.finish(&[beside]).await, ["cancelled"]);
    let by = world.words("select actor from tasker.audit where action = 'cancel'").await;
    assert_eq!(by, ["schedule tests/busy"]);

    for _ in 0..2 {
        let claim = world.claim().await;
        world.succeed(&claim).await;
    }
    assert_eq!(world.finish(&[first, last]).await, ["complete", "complete"]);
    set(Overlap::Skip).await;
    client.trigger_schedule(name, None, None).await.expect("the last one has ended");
    let view = client.schedule(NAMESPACE, "busy").await.expect("read").expect("there");
    assert_eq!((view.runs, view.skipped), (4, 1));
    let audit = world
        .words(
            "select action || ' ' || actor || ' ' || coalesce(reason, '') from tasker.audit order by audit_id limit 2",
        )
        .await;
    assert_eq!(audit, ["schedule.created ada ", "schedule.trigger ada now, please"]);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_schedule_rests_and_forgets_what_it_missed() {
    let world = World::start(Setup::default()).await;
    world.register_steps("one", "a: ok").await;
    let client = client(&world).await;
    let name = (NAMESPACE, "resting");
    let schedule =
        Schedule { missed: Missed::RunAll, every: Some("1s".into()), paused: Some(true), ..hourly("resting") };
    client.set_schedule(&schedule, None).await.expect("set");
    sqlx::query(
        "update tasker.schedules set anchor_at = anchor_at - interval '1 h', next_at = next_at - interval '1 h'",
    )
    .execute(&world.pool)
    .await
    .expect("time passes");
    client.pause_schedule(name, false, Some("ada"), None).await.expect("resumed");
    eventually("it runs again", async || (world.number("select runs from tasker.schedules").await > 0).then_some(()))
        .await;
    client.pause_schedule(name, true, Some("ada"), Some("enough")).await.expect("paused");
    let runs = world.number("select runs from tasker.schedules").await;
    assert!(runs < 60, "an hour of missed ticks was made up for: {runs}");
    client.delete_schedule(name, None, None).await.expect("deleted");
    let gone = client.delete_schedule(name, None, None).await.unwrap_err();
    assert!(matches!(&gone, ClientError::Refused(why) if why == "no such schedule"), "{gone}");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_schedules_are_refused_or_explained_and_cost_only_themselves() {
    let world = World::start(Setup::default()).await;
    world.register_steps("one", "a: ok").await;
    let client = client(&world).await;
    let never = Schedule { every: None, cron: Some("0 0 31 2 *".into()), ..hourly("never") };
    let cases = [
        (never, "cron: \"0 0 31 2 *\" never fires"),
        (Schedule { template: "none".into(), ..hourly("a") }, "template: no template none is registered"),
        (Schedule { input: Value::from(1), ..hourly("a") }, "input: must be a JSON object"),
        (Schedule { name: "A".into(), ..hourly("a") }, "name: must match"),
    ];
    for (schedule, expected) in cases {
        let refused = client.set_schedule(&schedule, None).await.unwrap_err().to_string();
        assert!(refused.starts_with(expected), "{refused}");
    }
    // SQL knows no calendar: an orchestrator finds out.
    sqlx::query("select tasker.set_schedule('tests', 'never', 'one', cron => '0 0 31 2 *')")
        .execute(&world.pool)
        .await
        .expect("set");
    // A good one with a task that is refused when its tick comes.
    client.set_schedule(&hourly("orphan"), None).await.expect("set");
    until_planned(&world).await;
    let view = client.schedule(NAMESPACE, "never").await.expect("read").expect("there");
    assert_eq!(view.next_at, None);
    assert_eq!(view.problem.as_deref(), Some("cron: \"0 0 31 2 *\" never fires in UTC; no such date comes"));
    sqlx::query("update tasker.schedules set version = 'gone' where name = 'orphan'")
        .execute(&world.pool)
        .await
        .expect("set");
    let refused = client.trigger_schedule((NAMESPACE, "orphan"), None, None).await.unwrap_err().to_string();
    assert!(refused.contains("template: no template one version gone is registered"), "{refused}");
    assert_eq!(world.counter("schedule_refused").await, 1);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delayed_start_wakes_the_sweep_if_nothing_is_due_before() {
    let world = World::start(Setup { orchestrators: 0, workers: 0, ..Setup::default() }).await;
    world.register_steps("one", "a: ok").await;
    let mut listener = sqlx::postgres::PgListener::connect(&world.url).await.expect("a listener");
    listener.listen("tasker").await.expect("listening");
    // A notification of our own after each, to see where one is missing.
    for (minutes, heard) in [(30, "due"), (60, "after 60"), (10, "due")] {
        sqlx::query(
            "select tasker.submit_task('tests', 'one', run_at => clock_timestamp() + make_interval(mins => $1))",
        )
        .bind(minutes)
        .execute(&world.pool)
        .await
        .expect("submitted");
        sqlx::query("select pg_notify('tasker', 'after ' || $1)")
            .bind(minutes)
            .execute(&world.pool)
            .await
            .expect("told");
        assert_eq!(listener.recv().await.expect("a notification").payload(), heard);
        if heard == "due" {
            assert_eq!(listener.recv().await.expect("a notification").payload(), format!("after {minutes}"));
        }
    }
    drop(listener);
    world.end().await;
}
