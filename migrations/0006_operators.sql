-- What people do to tasks by hand. Each function checks the state as it is now and sends a wish;
-- an orchestrator decides, and keeps who did it and why in the audit.

-- The audit is append-only, whoever asks.
create function tasker.audit_is_append_only() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception 'tasker.audit is append-only: what was done stays written' using errcode = '42501';
end
$$;
create trigger audit_is_append_only before update or delete on tasker.audit
  for each row execute function tasker.audit_is_append_only();
create trigger audit_is_not_truncated before truncate on tasker.audit
  for each statement execute function tasker.audit_is_append_only();

-- The word that people see beside a task's state: its status, or that it is blocked.
create function tasker.status_word(p_state text) returns text
language sql immutable parallel safe
as $$
  select case p_state when 'pending' then 'queued' when 'suspended' then 'suspended' when 'complete' then 'completed'
    when 'resolved_manually' then 'completed' when 'error' then 'failed' when 'cancelled' then 'cancelled'
    when 'blocked_by_failures' then 'blocked' when 'waiting_for_dependencies' then 'waiting'
    when 'waiting_for_retry' then 'waiting' else 'running' end
$$;

-- Why an act cannot be asked of a task in this state, or null.
create function tasker.act_problem(p_action text, p_state text, p_steps text[]) returns text
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
  select case
    when ended and p_action not in ('retry', 'rerun') then format('the task has already ended (%s)', word)
    when p_action = 'suspend' and p_state = 'suspended' then 'the task is suspended already'
    when p_action = 'resume' and p_state <> 'suspended' then format('the task is %s; only a suspended task can be resumed', word)
    when p_action in ('give_up', 'resolve') and p_state <> 'blocked_by_failures'
      then format('the task is %s; only a blocked task can be given up or resolved', word)
    when p_action = 'retry' and p_state not in ('error', 'cancelled', 'blocked_by_failures')
      then format('the task is %s; only a failed, cancelled or blocked task can be retried', word)
    when p_action = 'retry' and ended and cardinality(p_steps) > 0
      then format('the task is %s; only of a blocked task single steps can be retried, of this one use rerun', word)
    when p_action = 'rerun' and not ended then format('the task is %s; only a task that has ended can be run again', word)
  end
  from (select p_state in ('complete', 'error', 'cancelled', 'resolved_manually') as ended,
    tasker.status_word(p_state) as word) e
$$;

-- Sends the wish. `p_more` has what the message carries beyond the task, the actor and the reason.
create function tasker.ask(p_task uuid, p_action text, p_reason text, p_actor text, p_more jsonb default '{}') returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_state     text;
  v_namespace text;
  v_template  int;
  v_steps     text[] := coalesce(array(select jsonb_array_elements_text(p_more->'steps')), '{}') || coalesce(array[p_more->>'step'], '{}');
  v_problem   text;
begin
  v_steps := array_remove(v_steps, null);
  select t.state, t.namespace, t.template_id into v_state, v_namespace, v_template from tasker.tasks t where t.task_uuid = p_task;
  if v_state is null or not tasker.may_use(v_namespace) then
    return 'no such task';
  end if;
  -- A suspension that nobody holds (each reading is counted until it is put back) is simply taken back.
  if p_action = 'resume' and v_state not in ('suspended', 'complete', 'error', 'cancelled', 'resolved_manually') then
    delete from pgmq.q_task_requests q where q.msg_id in (
      select r.msg_id from pgmq.q_task_requests r
      where r.message->>'type' = 'suspend' and r.message->>'task' = p_task::text and r.read_ct = 0
      for update skip locked);
    if found then
      insert into tasker.audit (task_uuid, action, actor, reason, details)
      values (p_task, 'resume', left(p_actor, 100), left(p_reason, 1000), '{"suspension": "taken back before it began"}');
      return 'accepted';
    end if;
    if exists (select from pgmq.q_task_requests r where r.message->>'type' = 'suspend' and r.message->>'task' = p_task::text) then
      return 'the task is just being suspended; ask again in a moment';
    end if;
  end if;
  v_problem := tasker.act_problem(p_action, v_state, v_steps);
  if v_problem is not null then
    return v_problem;
  end if;
  select format('step: the template has no step %s', left(n, 40)) into v_problem
  from unnest(v_steps) n
  where not exists (select from tasker.template_steps d where d.template_id = v_template and d.name = n) limit 1;
  if v_problem is not null then
    return v_problem;
  end if;
  if cardinality(v_steps) > 0 then
    select case
      when s.state is null then 'the task has not begun; it has no steps yet'
      when p_action like '%\_step' and s.state in ('complete', 'cancelled', 'skipped', 'resolved_manually')
        then format('step %s is %s already', d.name, s.state)
      when p_action = 'retry' and s.state <> 'error' then format('step %s is %s; only a failed step can be retried', d.name, s.state)
    end into v_problem
    from unnest(v_steps) n
    join tasker.template_steps d on d.template_id = v_template and d.name = n
    left join tasker.steps s on s.task_uuid = p_task and s.step_index = d.step_index and s.item = -1
    order by 1 nulls last limit 1;
    if v_problem is not null then
      return v_problem;
    end if;
  end if;
  perform pgmq.send('task_requests', jsonb_build_object('v', 1, 'type', p_action,
    'task', p_task, 'actor', left(p_actor, 100), 'reason', left(p_reason, 1000)) || p_more);
  perform tasker.wake('task_requests');
  return 'accepted';
end
$$;

-- Running attempts finish and their results count; nothing more is sent until it is resumed.
create function tasker.suspend_task(task uuid, reason text default null, actor text default session_user) returns text
language sql security definer
set search_path = pg_catalog, pg_temp
as $$ select tasker.ask(task, 'suspend', reason, actor) $$;

-- Goes on where it stood: sends what is ready, fires what came due, evaluates what finished.
create function tasker.resume_task(task uuid, reason text default null, actor text default session_user) returns text
language sql security definer
set search_path = pg_catalog, pg_temp
as $$ select tasker.ask(task, 'resume', reason, actor) $$;

-- Ends the task; running handlers are asked to stop, or dropped.
create function tasker.cancel_task(
  task uuid, reason text default null, terminate boolean default false, actor text default session_user
) returns text
language sql security definer
set search_path = pg_catalog, pg_temp
as $$ select tasker.ask(task, case when terminate then 'terminate' else 'cancel' end, reason, actor) $$;

-- Tries again what failed: of a finished task in a new generation, keeping what is done; of a
-- blocked one, everything that failed or only these steps.
create function tasker.retry_task(
  task uuid, reason text default null, actor text default session_user, steps text[] default null
) returns text
language sql security definer
set search_path = pg_catalog, pg_temp
as $$
  select tasker.ask(task, 'retry', reason, actor,
    case when cardinality(steps) > 0 then jsonb_build_object('steps', to_jsonb(steps)) else '{}' end)
$$;

-- The failures of a blocked task are final: it ends as failed.
create function tasker.give_up_task(task uuid, reason text default null, actor text default session_user) returns text
language sql security definer
set search_path = pg_catalog, pg_temp
as $$ select tasker.ask(task, 'give_up', reason, actor) $$;

-- A blocked task was settled outside: it ends as resolved by hand.
create function tasker.resolve_task(task uuid, reason text default null, actor text default session_user) returns text
language sql security definer
set search_path = pg_catalog, pg_temp
as $$ select tasker.ask(task, 'resolve', reason, actor) $$;

-- Begins the next generation of a finished task at these steps: they and all that follow from
-- them run again, the others keep what they came to.
create function tasker.rerun_task(
  task uuid, from_steps text[], reason text default null, actor text default session_user
) returns text
language sql security definer
set search_path = pg_catalog, pg_temp
as $$
  select case when coalesce(cardinality(from_steps), 0) = 0 then 'from_steps: name at least one step'
    else tasker.ask(task, 'rerun', reason, actor, jsonb_build_object('steps', to_jsonb(from_steps))) end
$$;

-- The step is not needed; what stands behind it goes on.
create function tasker.skip_step(task uuid, step text, reason text default null, actor text default session_user) returns text
language sql security definer
set search_path = pg_catalog, pg_temp
as $$ select tasker.ask(task, 'skip_step', reason, actor, jsonb_build_object('step', coalesce(step, ''))) $$;

-- An output given by hand has the limits of any other.
create function tasker.settle_step(p_task uuid, p_step text, p_action text, p_output jsonb, p_reason text, p_actor text) returns text
language sql
set search_path = pg_catalog, pg_temp
as $$
  select coalesce('output: ' || tasker.payload_problem(p_output, tasker.max_payload_bytes()),
    tasker.ask(p_task, p_action, p_reason, p_actor, jsonb_build_object('step', coalesce(p_step, ''))
      || case when p_output is not null then jsonb_build_object('output', p_output) else '{}' end))
$$;

-- The step was settled outside; with an output, the steps behind it read it.
create function tasker.resolve_step(
  task uuid, step text, output jsonb default null, reason text default null, actor text default session_user
) returns text
language sql security definer
set search_path = pg_catalog, pg_temp
as $$ select tasker.settle_step(task, step, 'resolve_step', output, reason, actor) $$;

-- The step counts as done by its handler, with this output.
create function tasker.complete_step(
  task uuid, step text, output jsonb default 'null', reason text default null, actor text default session_user
) returns text
language sql security definer
set search_path = pg_catalog, pg_temp
as $$ select tasker.settle_step(task, step, 'complete_step', output, reason, actor) $$;

-- Does one act to every task that matches, up to `p_max` of them in the order of their uuids, and
-- says how many there were, a few of them, and where the next page begins (null: that was all).
-- The filter may name namespace, template, status (the public word), correlation_id, and `after`.
create function tasker.act_on_tasks(
  p_filter jsonb, p_action text, p_reason text default null, p_actor text default session_user,
  p_dry_run boolean default true, p_max int default 1000
) returns jsonb
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_states  text[];
  v_unknown text;
  v_tasks   uuid[];
  v_asked   bigint;
begin
  if p_action is null or p_action not in ('cancel', 'terminate', 'suspend', 'resume', 'retry', 'give_up', 'resolve') then
    raise exception 'action: must be cancel, terminate, suspend, resume, retry, give_up or resolve' using errcode = '22023';
  end if;
  select k into v_unknown from jsonb_object_keys(p_filter) k
  where k not in ('namespace', 'template', 'status', 'correlation_id', 'after') limit 1;
  if v_unknown is not null then
    raise exception 'filter: % is not known; use namespace, template, status, correlation_id and after', left(v_unknown, 40) using errcode = '22023';
  end if;
  if not p_filter ?| array['namespace', 'template', 'status', 'correlation_id'] then
    raise exception 'filter: must say which tasks; name a namespace, template, status or correlation_id' using errcode = '22023';
  end if;
  v_states := case p_filter->>'status'
    when 'queued' then array['pending'] when 'running' then array['steps_in_process']
    when 'waiting' then array['waiting_for_dependencies', 'waiting_for_retry', 'blocked_by_failures']
    when 'suspended' then array['suspended'] when 'completed' then array['complete', 'resolved_manually']
    when 'failed' then array['error'] when 'cancelled' then array['cancelled'] end;
  if p_filter->>'status' is not null and v_states is null then
    raise exception 'status: must be queued, running, waiting, suspended, completed, failed or cancelled' using errcode = '22023';
  end if;
  v_tasks := array(
    select t.task_uuid from tasker.tasks t join tasker.templates p on p.template_id = t.template_id
    where (p_filter->>'namespace' is null or t.namespace = p_filter->>'namespace')
      and (p_filter->>'template' is null or p.name = p_filter->>'template')
      and (v_states is null or t.state = any(v_states))
      and (p_filter->>'correlation_id' is null or t.correlation_id = p_filter->>'correlation_id')
      and (p_filter->>'after' is null or t.task_uuid > (p_filter->>'after')::uuid)
      and tasker.act_problem(p_action, t.state, '{}') is null
      and tasker.may_use(t.namespace)
    order by t.task_uuid limit least(greatest(p_max, 1), 10000));
  if not p_dry_run then
    select count(*) into v_asked from unnest(v_tasks) u(task) where tasker.ask(u.task, p_action, p_reason, p_actor) = 'accepted';
  end if;
  return jsonb_build_object('matched', cardinality(v_tasks), 'asked', coalesce(v_asked, 0), 'dry_run', p_dry_run,
    'sample', to_jsonb(v_tasks[1:20]),
    'next', case when cardinality(v_tasks) = least(greatest(p_max, 1), 10000) then v_tasks[cardinality(v_tasks)] end);
end
$$;

revoke all on all functions in schema tasker from public;
