-- Waits of steps that run no handler: the signals that were sent, and how one is sent.

-- Sent and not used yet, whether or not a step waits for it already. A step that uses one
-- deletes it; what is left goes when the task ends.
create table tasker.signals (
  signal_id    bigint generated always as identity primary key,
  task_uuid    uuid not null,
  name         text not null,
  payload      jsonb not null,
  actor        text not null,
  traceparent  text,
  sent_at      timestamptz not null default clock_timestamp()
);
create index signals_by_task on tasker.signals (task_uuid, signal_id);

-- Keeps the signal and sends the hint; an orchestrator gives it to the first step, in file
-- order, that waits for it. Returns 'accepted', or why not.
create function tasker.signal_task(
  task uuid, name text, payload jsonb default '{}', actor text default session_user, traceparent text default null
) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
  v_state     text;
  v_namespace text;
  v_template  int;
  v_waits     jsonb;
  v_problem   text;
begin
  select t.state, t.namespace, t.template_id into v_state, v_namespace, v_template
  from tasker.tasks t where t.task_uuid = task;
  if v_state is null or not tasker.may_use(v_namespace) then
    return 'no such task';
  end if;
  if v_state in ('complete', 'error', 'cancelled', 'resolved_manually') then
    return format('the task has already ended (%s)', tasker.status_word(v_state));
  end if;
  payload := coalesce(payload, '{}');
  v_problem := tasker.payload_problem(payload, tasker.max_payload_bytes());
  if v_problem is not null then
    return 'payload: ' || v_problem;
  end if;
  select jsonb_path_query_array(d.definition, '$.steps[*].wait.signal') into v_waits
  from tasker.templates d where d.template_id = v_template;
  if not exists (select from jsonb_array_elements(v_waits) w where w->>'name' = name) then
    return coalesce(
      (select format('name: no step of this task waits for a signal of this name; it waits for: %s',
         left(string_agg(distinct w->>'name', ', '), 1000)) from jsonb_array_elements(v_waits) w having count(*) > 0),
      'name: no step of this task waits for a signal');
  end if;
  if not exists (select from jsonb_array_elements(v_waits) w
                 where w->>'name' = name and (w->'allowed' is null or w->'allowed' @> jsonb_build_array(payload->'answer'))) then
    return (select format('payload: answer must be one of: %s', left(string_agg(distinct a, ', '), 1000))
            from jsonb_array_elements(v_waits) w, jsonb_array_elements_text(w->'allowed') a where w->>'name' = name);
  end if;
  if (select count(*) from (select from tasker.signals k where k.task_uuid = task limit 1000) kept) >= 1000 then
    return 'the task already keeps 1000 signals that no step has used; send no more until it has';
  end if;
  insert into tasker.signals (task_uuid, name, payload, actor, traceparent)
  values (task, name, payload, left(coalesce(actor, session_user), 100),
    case when tasker.is_traceparent(traceparent) then traceparent end);
  perform pgmq.send('task_requests', jsonb_build_object('v', 1, 'type', 'signal', 'task', task));
  perform tasker.wake('task_requests');
  return 'accepted';
end
$$;
revoke all on function tasker.signal_task from public;
