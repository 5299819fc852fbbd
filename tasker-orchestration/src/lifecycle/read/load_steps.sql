-- The steps that events are about, and what was reported of their current attempts.
select s.step_uuid as "step_uuid!", s.task_uuid as "task_uuid!", s.step_index as "step_index!", s.item as "item!", s.state as "state!", s.version as "version!", s.generation as "generation!", s.attempt as "attempt!", s.failures as "failures!", s.losses as "losses!",
  s.remaining_dependencies as "remaining_dependencies!", s.skipped_dependencies as "skipped_dependencies!", s.priority as "priority!", s.claim_token, s.claimed_by, s.lease_expires_at, s.last_heartbeat_at,
  s.enqueued_version, s.enqueued_task_version, s.enqueued_event, s.enqueued_began_at, s.enqueued_at,
  s.due_at, s.ready_at, s.held_by, s.last_at as "last_at!",
  a.worker as "worker?", a.worker_version as "worker_version?", a.message_id as "message_id?",
  a.result_message_id as "result_message_id?", a.claim_began_at as "claim_began_at?", a.claimed_at as "claimed_at?",
  a.report_began_at as "report_began_at?", a.reported_at as "reported_at?",
  a.start_offset_ms as "start_offset_ms?", a.run_ms as "run_ms?", a.outcome as "outcome?", a.output as "output?",
  a.error as "error?", a.usage as "usage?", a.milestones as "milestones?", clock_timestamp() as "now!"
from tasker.steps s
left join tasker.attempts a on a.task_uuid = s.task_uuid and a.step_uuid = s.step_uuid and a.attempt = s.attempt
where s.step_uuid = any($1::uuid[])
