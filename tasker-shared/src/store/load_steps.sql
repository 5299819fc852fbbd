-- The steps that events are about, their attempts' reports, and their direct dependents.
with wanted as materialized (
  select s.step_uuid, s.task_uuid, s.step_index, true as reported from tasker.steps s where s.step_uuid = any($1::uuid[])
), behind as (
  select distinct c.step_uuid
  from wanted w
  join tasker.tasks t on t.task_uuid = w.task_uuid
  join tasker.template_edges e on e.template_id = t.template_id and e.parent_index = w.step_index
  join tasker.steps c on c.task_uuid = w.task_uuid and c.step_index = e.child_index
), chosen as (
  select step_uuid, true as reported from wanted
  union all
  select b.step_uuid, false from behind b where not exists (select from wanted w where w.step_uuid = b.step_uuid)
)
select s.step_uuid as "step_uuid!", s.task_uuid as "task_uuid!", s.step_index as "step_index!", s.state as "state!",
  s.version as "version!", s.generation as "generation!", s.attempt as "attempt!", s.failures as "failures!",
  s.losses as "losses!", s.remaining_dependencies as "remaining_dependencies!", s.priority as "priority!",
  s.claim_token, s.claimed_by, s.lease_expires_at, s.last_heartbeat_at,
  s.enqueued_version, s.enqueued_task_version, s.enqueued_event, s.enqueued_began_at, s.enqueued_at,
  s.due_at, s.ready_at, s.held_by, s.last_at as "last_at!", ch.reported as "reported!",
  a.worker as "worker?", a.worker_version as "worker_version?", a.message_id as "message_id?",
  a.result_message_id as "result_message_id?", a.claim_began_at as "claim_began_at?", a.claimed_at as "claimed_at?",
  a.report_began_at as "report_began_at?", a.reported_at as "reported_at?",
  a.start_offset_ms as "start_offset_ms?", a.run_ms as "run_ms?", a.outcome as "outcome?", a.output as "output?",
  a.error as "error?", clock_timestamp() as "now!"
from chosen ch
join tasker.steps s on s.step_uuid = ch.step_uuid
left join tasker.attempts a
  on ch.reported and a.task_uuid = s.task_uuid and a.step_uuid = s.step_uuid and a.attempt = s.attempt
