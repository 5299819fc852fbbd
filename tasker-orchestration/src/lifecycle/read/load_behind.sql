-- Steps by their place in their task. All columns come from one list, so that the unique
-- index is always asked for both: by task alone it would read every step of a wide task.
select s.step_uuid as "step_uuid!", s.task_uuid as "task_uuid!", s.step_index as "step_index!", s.state as "state!", s.version as "version!", s.generation as "generation!", s.attempt as "attempt!", s.failures as "failures!", s.losses as "losses!",
  s.remaining_dependencies as "remaining_dependencies!", s.skipped_dependencies as "skipped_dependencies!", s.priority as "priority!", s.ready_at, s.held_by, s.last_at as "last_at!", s.item as "item!"
from unnest($1::uuid[], $2::int[], $3::int[]) w(task_uuid, step_index, item)
join tasker.steps s on s.task_uuid = w.task_uuid and s.step_index = w.step_index and s.item = w.item
