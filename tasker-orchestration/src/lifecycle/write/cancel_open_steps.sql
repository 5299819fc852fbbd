-- Moves every open step of these tasks to cancelled, and says what it closed. Runs after the
-- plans were applied, in the same transaction, with the same times.
with ended as (
  select t.task_uuid, t.reason, t.ended_by from tasker.tasks t where t.task_uuid = any($1::uuid[])
), open as materialized (
  select s.step_uuid, s.task_uuid, s.state, s.version, s.generation, s.attempt, s.claim_token, s.claimed_by, s.last_at,
    s.due_at, s.ready_at, s.held_by, e.reason,
    s.state in ('enqueued', 'in_progress', 'enqueued_for_orchestration', 'enqueued_as_error_for_orchestration') as has_attempt
  from ended e join tasker.steps s on s.task_uuid = e.task_uuid
  where s.state not in ('complete', 'error', 'cancelled', 'skipped', 'resolved_manually')
  order by s.step_uuid for no key update of s
), moved as (
  update tasker.steps s
  set state = 'cancelled', version = o.version + 1, last_at = greatest($3, s.last_at + interval '1 us'),
      due_at = null, ready_at = null, held_by = null
  from open o where s.step_uuid = o.step_uuid
  returning s.step_uuid, s.last_at
), logged as (
  insert into tasker.transitions (task_uuid, entity_uuid, version, generation, attempt, from_state, to_state, event,
    claim_token, began_at, at, detail)
  select o.task_uuid, o.step_uuid, o.version + 1, o.generation, case when o.has_attempt or o.state = 'waiting' then o.attempt end,
    o.state, 'cancelled', 'Cancel', case when o.has_attempt then o.claim_token end, $2, $3,
    jsonb_strip_nulls(jsonb_build_object('reason', o.reason, 'error_type', 'cancelled',
      'waits', nullif(
        case when o.state = 'waiting_for_retry' then jsonb_build_array(jsonb_build_object(
          'reason', 'retry', 'since', o.last_at, 'until', o.due_at, 'ended', o.ready_at, 'ordinal', o.version))
        when o.state = 'waiting' then jsonb_build_array(jsonb_build_object(
          'reason', coalesce((select r.detail->>'waiting' from tasker.transitions r
             where r.task_uuid = o.task_uuid and r.entity_uuid = o.step_uuid and r.version = o.version), 'timer'),
          'since', o.last_at, 'until', o.due_at, 'ordinal', o.version)) else '[]' end
        || case when o.held_by is not null then jsonb_build_array(jsonb_build_object(
          'reason', o.held_by, 'since', o.ready_at, 'ordinal', o.version + 1)) else '[]' end, '[]')))
  from open o join moved m on m.step_uuid = o.step_uuid
), unwatched as (
  -- Retries are found by their time: no index has them by their task.
  delete from tasker.due d using open o
  where o.state = 'waiting_for_retry' and d.due_at = o.due_at and d.kind = 'retry' and d.task_uuid = o.task_uuid
)
select o.task_uuid as "task_uuid!", o.has_attempt as "has_attempt!",
  case when o.state = 'in_progress' then o.claimed_by end as "claimed_by"
from open o
