//! Maps: how far they have come, the lists they run over, and what they came to. Statements of
//! their own: a task without a map never pays for one.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::PgConnection;
use tasker_shared::state_machine::plan::{Map, MapOutput, Plan};
use tasker_shared::store::Error;
use uuid::Uuid;

/// Items kept in one row.
const CHUNK: usize = 100;

/// How far the maps of these steps have come, `(task, step)`; a step that never began as a map is not in the answer.
pub async fn load(conn: &mut PgConnection, steps: &[(Uuid, Uuid)]) -> Result<HashMap<Uuid, Map>, Error> {
    let (tasks, steps): (Vec<Uuid>, Vec<Uuid>) = steps.iter().copied().unzip();
    let rows = sqlx::query!(
        "select m.step_uuid, m.items, m.next_item, m.remaining_items, m.failed_items
         from unnest($1::uuid[], $2::uuid[]) w(task_uuid, step_uuid)
         join tasker.maps m on m.task_uuid = w.task_uuid and m.step_uuid = w.step_uuid",
        &tasks,
        &steps
    )
    .fetch_all(conn)
    .await?;
    let count = |n: i32| u32::try_from(n).unwrap_or_default();
    let maps = rows.into_iter().map(|row| {
        let [items, next_item] = [row.items, row.next_item].map(count);
        let [remaining_items, failed_items] = [row.remaining_items, row.failed_items].map(count);
        (row.step_uuid, Map { items, next_item, remaining_items, failed_items })
    });
    Ok(maps.collect())
}

/// The open items of those of these steps that are maps.
pub async fn open_items(conn: &mut PgConnection, steps: &[Uuid]) -> Result<Vec<Uuid>, Error> {
    Ok(sqlx::query_scalar!(
        "select i.step_uuid
         from tasker.steps s join tasker.maps m on m.task_uuid = s.task_uuid and m.step_uuid = s.step_uuid
         join tasker.steps i on i.task_uuid = s.task_uuid and i.step_index = s.step_index and i.item >= 0
         where s.step_uuid = any($1) and i.state not in ('complete', 'error', 'cancelled', 'skipped', 'resolved_manually')",
        steps
    )
    .fetch_all(conn)
    .await?)
}

/// A part of the list of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// The map's task.
    pub task: Uuid,
    /// Its step.
    pub step: Uuid,
    /// The first item.
    pub from: u32,
    /// How many.
    pub count: u32,
}

/// The items of these parts, and what stands beside them in their rows: by step, the index of the
/// first value, and the values.
pub async fn load_items(
    conn: &mut PgConnection,
    windows: &[Window],
) -> Result<HashMap<Uuid, (u32, Vec<Value>)>, Error> {
    let chunk = |item: u32| i32::try_from(item as usize / CHUNK).unwrap_or(i32::MAX);
    let tasks: Vec<Uuid> = windows.iter().map(|window| window.task).collect();
    let steps: Vec<Uuid> = windows.iter().map(|window| window.step).collect();
    let first: Vec<i32> = windows.iter().map(|window| chunk(window.from)).collect();
    let last: Vec<i32> = windows.iter().map(|window| chunk(window.from + window.count)).collect();
    let rows = sqlx::query!(
        r#"select i.step_uuid as "step_uuid!", i.chunk as "chunk!", i.items as "items!"
           from unnest($1::uuid[], $2::uuid[], $3::int[], $4::int[]) w(task_uuid, step_uuid, first, last)
           join tasker.map_items i on i.task_uuid = w.task_uuid and i.step_uuid = w.step_uuid and i.chunk between w.first and w.last
           order by i.step_uuid, i.chunk"#,
        &tasks,
        &steps,
        &first,
        &last
    )
    .fetch_all(conn)
    .await?;
    let mut loaded: HashMap<Uuid, (u32, Vec<Value>)> = HashMap::new();
    for row in rows {
        let start = usize::try_from(row.chunk).unwrap_or_default() * CHUNK;
        let (_, values) =
            loaded.entry(row.step_uuid).or_insert_with(|| (u32::try_from(start).unwrap_or(u32::MAX), Vec::new()));
        if let Value::Array(items) = row.items {
            values.extend(items);
        }
    }
    Ok(loaded)
}

/// The outputs of a map's items in the order of its list, null for those that failed; or why
/// they cannot be kept. Called when every item has ended or was just reported; of those in `ended`,
/// by index, it is not written yet.
pub async fn collect(
    conn: &mut PgConnection,
    map_step: Uuid,
    ended: &[(u32, Value)],
) -> Result<Result<Value, String>, Error> {
    let items: Vec<i32> = ended.iter().map(|(item, _)| i32::try_from(*item).unwrap_or(-1)).collect();
    let outputs: Vec<Value> = ended.iter().map(|(_, output)| output.clone()).collect();
    let row = sqlx::query!(
        r#"select coalesce(c.output, '[]') as "output!", tasker.payload_problem(c.output, tasker.max_payload_bytes()) as problem
           from (
             select jsonb_agg(coalesce(n.output, case when s.state in ('complete', 'enqueued_for_orchestration') and a.outcome = 'success'
               then a.output end) order by s.item) as output
             from tasker.steps m
             join tasker.maps o on o.task_uuid = m.task_uuid and o.step_uuid = m.step_uuid
             join tasker.steps s on s.task_uuid = m.task_uuid and s.step_index = m.step_index and s.item >= 0 and s.item < o.items
             left join tasker.attempts a on a.task_uuid = s.task_uuid and a.step_uuid = s.step_uuid and a.attempt = s.attempt
             left join unnest($2::int[], $3::jsonb[]) n(item, output) on n.item = s.item
             where m.step_uuid = $1
           ) c"#,
        map_step,
        &items,
        &outputs
    )
    .fetch_one(conn)
    .await?;
    Ok(row.problem.map_or(Ok(row.output), Err))
}

/// Writes what these plans say of maps.
pub(super) async fn apply(conn: &mut PgConnection, plans: &[&Plan], at: DateTime<Utc>) -> Result<(), Error> {
    let forgotten: Vec<(Uuid, Uuid)> =
        plans.iter().flat_map(|plan| plan.forgotten_maps.iter().map(|step| (plan.task.uuid, *step))).collect();
    if !forgotten.is_empty() {
        forget(conn, &forgotten).await?;
    }
    let maps: Vec<(Uuid, Uuid, Map)> =
        plans.iter().flat_map(|plan| plan.maps.iter().map(|(step, map)| (plan.task.uuid, *step, *map))).collect();
    if maps.is_empty() {
        return Ok(());
    }
    let count = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
    let tasks: Vec<Uuid> = maps.iter().map(|(task, ..)| *task).collect();
    let steps: Vec<Uuid> = maps.iter().map(|(_, step, _)| *step).collect();
    let items: Vec<i32> = maps.iter().map(|(.., map)| count(map.items)).collect();
    let next: Vec<i32> = maps.iter().map(|(.., map)| count(map.next_item)).collect();
    let remaining: Vec<i32> = maps.iter().map(|(.., map)| count(map.remaining_items)).collect();
    let failed: Vec<i32> = maps.iter().map(|(.., map)| count(map.failed_items)).collect();
    sqlx::query!(
        "insert into tasker.maps as m (task_uuid, step_uuid, items, next_item, remaining_items, failed_items)
         select * from unnest($1::uuid[], $2::uuid[], $3::int[], $4::int[], $5::int[], $6::int[])
         on conflict (task_uuid, step_uuid) do update
         set next_item = excluded.next_item, remaining_items = excluded.remaining_items, failed_items = excluded.failed_items",
        &tasks,
        &steps,
        &items,
        &next,
        &remaining,
        &failed
    )
    .execute(&mut *conn)
    .await?;
    for plan in plans {
        insert_lists(conn, plan).await?;
    }
    let outputs: Vec<(Uuid, &MapOutput)> =
        plans.iter().flat_map(|plan| plan.map_outputs.iter().map(|output| (plan.task.uuid, output))).collect();
    if !outputs.is_empty() {
        insert_outputs(conn, &outputs, at).await?;
    }
    Ok(())
}

async fn forget(conn: &mut PgConnection, maps: &[(Uuid, Uuid)]) -> Result<(), Error> {
    let (tasks, steps): (Vec<Uuid>, Vec<Uuid>) = maps.iter().copied().unzip();
    sqlx::query!(
        "with w as (select * from unnest($1::uuid[], $2::uuid[]) w(task_uuid, step_uuid)), lists as (
           delete from tasker.map_items i using w where i.task_uuid = w.task_uuid and i.step_uuid = w.step_uuid
         )
         delete from tasker.maps m using w where m.task_uuid = w.task_uuid and m.step_uuid = w.step_uuid",
        &tasks,
        &steps
    )
    .execute(conn)
    .await?;
    Ok(())
}

async fn insert_lists(conn: &mut PgConnection, plan: &Plan) -> Result<(), Error> {
    for (step, values) in &plan.lists {
        let chunks: Vec<Value> = values.chunks(CHUNK).map(|chunk| Value::Array(chunk.to_vec())).collect();
        let numbers: Vec<i32> = (0_i32..).take(chunks.len()).collect();
        sqlx::query!(
            "insert into tasker.map_items (task_uuid, step_uuid, chunk, items)
             select $1, $2, n.chunk, n.items from unnest($3::int[], $4::jsonb[]) n(chunk, items)",
            plan.task.uuid,
            step,
            &numbers,
            &chunks
        )
        .execute(&mut *conn)
        .await?;
    }
    Ok(())
}

/// A map ran no attempt of its own, so its output stands as that of attempt 0.
async fn insert_outputs(
    conn: &mut PgConnection,
    outputs: &[(Uuid, &MapOutput)],
    at: DateTime<Utc>,
) -> Result<(), Error> {
    let tasks: Vec<Uuid> = outputs.iter().map(|(task, _)| *task).collect();
    let steps: Vec<Uuid> = outputs.iter().map(|(_, output)| output.step).collect();
    let generations: Vec<i32> = outputs.iter().map(|(_, output)| output.generation).collect();
    let values: Vec<Value> = outputs.iter().map(|(_, output)| output.output.clone()).collect();
    sqlx::query!(
        "insert into tasker.attempts (task_uuid, step_uuid, attempt, generation, claim_token, worker, claim_began_at, claimed_at,
           report_began_at, reported_at, outcome, output)
         select n.task_uuid, n.step_uuid, 0, n.generation, gen_random_uuid(), '', $5, $5, $5, $5, 'success', n.output
         from unnest($1::uuid[], $2::uuid[], $3::int[], $4::jsonb[]) n(task_uuid, step_uuid, generation, output)
         on conflict (task_uuid, step_uuid, attempt) do update set generation = excluded.generation, output = excluded.output",
        &tasks,
        &steps,
        &generations,
        &values,
        at
    )
    .execute(conn)
    .await?;
    Ok(())
}
