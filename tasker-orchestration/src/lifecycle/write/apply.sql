-- A batch of plans in one statement: compare-and-set of tasks and steps, new steps, the log,
-- the due hints, one export batch, and what the queues take and give. Every row
-- gets the same `at`.
with clock as materialized (
  select greatest(clock_timestamp(), $1::timestamptz) as at
), task as (
  update tasker.tasks t
  set state = n.state, version = n.version, generation = n.generation,
      open_steps = n.open_steps, in_flight_steps = n.in_flight_steps, retrying_steps = n.retrying_steps,
      held_steps = n.held_steps, failed_steps = n.failed_steps,
      error_type = n.error_type, reason = n.reason, ended_by = n.ended_by,
      generation_began_at = case when n.generation = t.generation then t.generation_began_at else $2 end,
      root_span_id = case when n.generation = t.generation then t.root_span_id
                          else tasker.span_id(t.trace_id, t.task_uuid, n.generation, 0, 1, 0) end,
      last_at = c.at,
      finished_at = case when n.state in ('complete', 'error', 'cancelled', 'resolved_manually') then c.at end
  from clock c, unnest($3::tasker.task_change[]) n
  where t.task_uuid = n.task_uuid and t.version = n.version_before
  returning t.task_uuid, t.finished_at
), step as (
  update tasker.steps s
  set state = n.state, version = n.version, generation = n.generation, attempt = n.attempt,
      failures = n.failures, losses = n.losses, remaining_dependencies = n.remaining_dependencies,
      input = coalesce(n.input, s.input),
      claim_token = case when n.enqueued then null else s.claim_token end,
      claimed_by = case when n.enqueued then null else s.claimed_by end,
      lease_expires_at = case when n.enqueued then null else s.lease_expires_at end,
      due_at = n.due_at, ready_at = n.ready_at, held_by = split_part(n.held_by, e'\x1f', 1),
      -- It stands behind the reason when a step begins to be held, and never changes.
      held_handler = coalesce(nullif(split_part(n.held_by, e'\x1f', 2), ''), s.held_handler),
      enqueued_version = case when n.enqueued then n.enqueued_version else s.enqueued_version end,
      enqueued_task_version = case when n.enqueued then n.enqueued_task_version else s.enqueued_task_version end,
      enqueued_event = case when n.enqueued then n.enqueued_event else s.enqueued_event end,
      enqueued_began_at = case when n.enqueued then $2 else s.enqueued_began_at end,
      enqueued_at = case when n.enqueued then c.at else s.enqueued_at end,
      last_at = case when n.version = n.version_before then s.last_at else c.at end
  from clock c, unnest($4::tasker.step_change[]) n
  where s.step_uuid = n.step_uuid and s.version = n.version_before
  returning 1
), created as (
  -- In the state the plan gives them, so that a root step costs one write.
  insert into tasker.steps (step_uuid, task_uuid, step_index, queue, priority, state, version, generation, attempt,
    remaining_dependencies, input, ready_at, held_by, held_handler, enqueued_version, enqueued_task_version, enqueued_event,
    enqueued_began_at, enqueued_at, last_at)
  select n.step_uuid, n.task_uuid, n.step_index, n.queue, n.priority, n.state, n.version, n.generation, n.attempt,
    n.remaining_dependencies, n.input, n.ready_at, split_part(n.held_by, e'\x1f', 1),
    nullif(split_part(n.held_by, e'\x1f', 2), ''), n.enqueued_version, n.enqueued_task_version, n.enqueued_event,
    case when n.enqueued then $2 end, case when n.enqueued then c.at end, c.at
  from clock c, unnest($5::tasker.new_step[]) n
), logged as (
  insert into tasker.transitions (task_uuid, entity_uuid, version, task_version, generation, attempt,
    from_state, to_state, event, actor, claim_token, began_at, at, detail)
  select n.task_uuid, n.entity_uuid, n.version, n.task_version, n.generation, n.attempt,
    n.from_state, n.to_state, n.event, n.actor, n.claim_token, $2, c.at, n.detail
  from clock c, unnest($6::tasker.log_row[]) n
), due as (
  insert into tasker.due (due_at, kind, task_uuid, step_uuids)
  select n.due_at, n.kind, n.task_uuid, case when n.step_uuid is not null then array[n.step_uuid] end
  from unnest($7::tasker.due_row[]) n
), batch as (
  insert into tasker.export_batches (batch_id, instance, task_uuids, at)
  select $8, $9, $10::uuid[], c.at from clock c where cardinality($10::uuid[]) > 0
)
select c.at as "at!",
  tasker.conclude($11, $12::bigint[], $13::bigint[], $14::text[], $15::jsonb[], $16::jsonb[])::text as concluded,
  (select count(*) from task) as "tasks!", (select count(*) from step) as "steps!",
  (select count(pg_notify('tasker_finished', f.task_uuid::text)) from task f
   where f.finished_at is not null
     and exists (select from tasker.readers r where r.queue = 'finished' and r.seen_at > c.at - interval '60 s')) as "told!"
from clock c
