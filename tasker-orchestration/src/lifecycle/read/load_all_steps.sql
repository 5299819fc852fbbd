-- Every step of these tasks, and whether the steps behind a skipped or failed one may take it
-- for done: only the log knows who skipped it, and what failed.
select s.step_uuid as "step_uuid!", s.task_uuid as "task_uuid!", s.step_index as "step_index!", s.item as "item!", s.state as "state!", s.version as "version!", s.generation as "generation!", s.attempt as "attempt!", s.failures as "failures!", s.losses as "losses!",
  s.remaining_dependencies as "remaining_dependencies!", s.skipped_dependencies as "skipped_dependencies!", s.priority as "priority!", s.enqueued_task_version,
  s.due_at, s.ready_at, s.held_by, s.last_at as "last_at!",
  s.state in ('skipped', 'error') and exists (
    select from tasker.transitions r
    where r.task_uuid = s.task_uuid and r.entity_uuid = s.step_uuid and r.version = s.version
      and case s.state when 'skipped' then r.actor is not null
          else coalesce(r.detail->>'error_type', '') <> all($2::text[]) end) as "passed!"
from tasker.steps s
where s.task_uuid = any($1::uuid[])
