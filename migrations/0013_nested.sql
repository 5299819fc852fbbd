-- Tasks that a step starts, and how long a step may take in all. The row says which attempt started which task, or why it could not;
-- the messages are hints to look at it.

create table tasker.children (
  task_uuid   uuid not null,
  step_uuid   uuid not null,
  attempt     int not null,
  -- Its place among the children of its parent, and how many parents stand above it.
  number      int not null,
  depth       int not null,
  awaited     boolean not null,
  child_uuid  uuid,
  error       text,
  primary key (task_uuid, step_uuid, attempt),
  constraint children_are_tasks_or_errors check (num_nonnulls(child_uuid, error) = 1)
);
create unique index children_by_number on tasker.children (task_uuid, number);
create unique index children_by_child on tasker.children (child_uuid);

-- Starts the tasks that these attempts ask for, in the transaction that says they wait. The
-- caller holds the locks of the parents and has written the inputs of the steps. Requests have
-- the keys of a submit, and step, attempt, awaited, may_be_kept (its trace was not sampled, and may
-- be exported for its end), and link: the traceparent that the root of a task which is not awaited
-- is linked to. One that cannot be done is answered like one that has ended.
create function tasker.start_children(p_requests jsonb) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
#variable_conflict use_column
declare
  v_asked jsonb;
begin
  select jsonb_agg(w.r || jsonb_build_object('number', w.number, 'depth', w.depth, 'problem', case
      when w.depth > 16 then 'it would be nested more than 16 deep; does a template start itself?'
      when w.number > 10000 then 'its task has started 10000 tasks, the limit; start them from several tasks'
    end) order by w.ordinal)
  into v_asked
  from (
    select o.r, o.ordinality as ordinal,
      coalesce((select max(k.number) from tasker.children k where k.task_uuid = (o.r->>'task')::uuid), 0)
        + row_number() over (partition by o.r->>'task' order by o.ordinality) as number,
      coalesce((select k.depth from tasker.children k where k.child_uuid = (o.r->>'task')::uuid), 0) + 1 as depth
    from jsonb_array_elements(p_requests) with ordinality o(r, ordinality)
  ) w;

  with asked as materialized (
    select o.ordinality::int as ordinal, (o.r->>'task')::uuid as task_uuid, (o.r->>'step')::uuid as step_uuid,
      (o.r->>'attempt')::int as attempt, (o.r->>'number')::int as number, (o.r->>'depth')::int as depth,
      (o.r->>'awaited')::boolean as awaited, o.r->>'problem' as problem
    from jsonb_array_elements(v_asked) with ordinality o(r, ordinality)
  ), submitted as materialized (
    -- What must not be started is asked for without a name, and so is refused.
    select s.ordinal, s.task_uuid, s.error from tasker.submit_tasks((
      select jsonb_agg(case when o.r->>'problem' is null
        then o.r || jsonb_build_object('input', (select s.input from tasker.steps s where s.step_uuid = (o.r->>'step')::uuid))
        else '{}' end order by o.ordinality)
      from jsonb_array_elements(v_asked) with ordinality o(r, ordinality))) s
  )
  insert into tasker.children (task_uuid, step_uuid, attempt, number, depth, awaited, child_uuid, error)
  select a.task_uuid, a.step_uuid, a.attempt, a.number, a.depth, a.awaited,
    case when a.problem is null then s.task_uuid end, coalesce(a.problem, s.error)
  from asked a join submitted s on s.ordinal = a.ordinal;

  update tasker.tasks t
  set parent_task_uuid = c.task_uuid, parent_step_uuid = c.step_uuid, parent_attempt = c.attempt,
      parent_correlation_id = p.correlation_id, root_link = r->>'link',
      trace_flags = t.trace_flags | case when (r->>'may_be_kept')::boolean then 128 else 0 end
  from jsonb_array_elements(p_requests) r
  join tasker.children c on c.task_uuid = (r->>'task')::uuid and c.step_uuid = (r->>'step')::uuid and c.attempt = (r->>'attempt')::int
  join tasker.tasks p on p.task_uuid = c.task_uuid
  where t.task_uuid = c.child_uuid;

  -- There is nothing to wait for.
  insert into pgmq.q_task_requests (vt, message)
  select clock_timestamp(), jsonb_build_object('v', 1, 'type', 'child', 'task', c.task_uuid, 'step', c.step_uuid, 'attempt', c.attempt)
  from jsonb_array_elements(p_requests) r
  join tasker.children c on c.task_uuid = (r->>'task')::uuid and c.step_uuid = (r->>'step')::uuid and c.attempt = (r->>'attempt')::int
  where c.child_uuid is null or not c.awaited;
  if found then
    perform tasker.wake('task_requests');
  end if;
end
$$;

-- Tells the parents that wait for these tasks, in the transaction that ends them.
create function tasker.tell_parents(p_children uuid[]) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
  insert into pgmq.q_task_requests (vt, message)
  select clock_timestamp(), jsonb_build_object('v', 1, 'type', 'child', 'task', c.task_uuid, 'step', c.step_uuid, 'attempt', c.attempt)
  from tasker.children c where c.child_uuid = any(p_children) and c.awaited;
  if found then
    perform tasker.wake('task_requests');
  end if;
end
$$;

-- Asks for the end of the tasks that these tasks and steps awaited and await no more.
create function tasker.cancel_children(p_tasks uuid[], p_steps uuid[]) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
  insert into pgmq.q_task_requests (vt, message)
  select clock_timestamp(), jsonb_build_object('v', 1, 'type', 'cancel', 'task', c.child_uuid, 'actor', 'tasker',
    'reason', format('task %s, which waited for it, does so no more', c.task_uuid))
  from tasker.children c join tasker.tasks t on t.task_uuid = c.child_uuid and t.finished_at is null
  where c.task_uuid = any(p_tasks) and c.awaited and (p_steps is null or c.step_uuid = any(p_steps));
  if found then
    perform tasker.wake('task_requests');
  end if;
end
$$;

-- What a finished task is to its parent: the outputs of its last steps, those that no other step
-- depends on, by name; or why that cannot be kept.
create function tasker.task_output(p_task uuid, out output jsonb, out problem text)
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_limit int := tasker.max_payload_bytes();
  v_bytes bigint;
begin
  select sum(octet_length(l.output::text)) into v_bytes from tasker.last_outputs(p_task) l;
  if v_bytes > v_limit then
    problem := format('the outputs of its last steps have %s bytes, the limit is %s; end it with a step that returns less', v_bytes, v_limit);
    return;
  end if;
  select coalesce(jsonb_object_agg(l.name, l.output), '{}') into output from tasker.last_outputs(p_task) l;
  problem := tasker.payload_problem(output, v_limit);
end
$$;

create function tasker.last_outputs(p_task uuid) returns table (name text, output jsonb)
language sql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
  select d.name, a.output
  from tasker.tasks t
  join tasker.template_steps d on d.template_id = t.template_id
  join tasker.steps s on s.task_uuid = t.task_uuid and s.step_index = d.step_index and s.item = -1
    and s.state in ('complete', 'resolved_manually')
  join tasker.attempts a on a.task_uuid = s.task_uuid and a.step_uuid = s.step_uuid and a.attempt = s.attempt
  where t.task_uuid = p_task and a.output is not null
    and not exists (select from tasker.template_edges e where e.template_id = d.template_id and e.parent_index = d.step_index)
$$;

-- What became of the tasks that these attempts started; those that are still awaited are not in the answer.
create function tasker.child_ends(p_tasks uuid[], p_steps uuid[], p_attempts int[])
returns table (step_uuid uuid, attempt int, output jsonb, error_type text, error text, link text)
language sql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
  select c.step_uuid, c.attempt,
    case when c.error is not null then null
      when not c.awaited then jsonb_build_object('task', c.child_uuid) else o.output end,
    -- Templates that start each other end at the first refusal: were it tried again at each of the
    -- levels above, it would be millions of tasks.
    case when c.error is not null and c.depth > 16 then 'nested_too_deep'
      when c.error is not null then 'child_not_created'
      when not c.awaited then null
      when t.state = 'error' and t.error_type = 'nested_too_deep' then t.error_type
      when t.state in ('error', 'cancelled') then 'child_failed'
      when o.problem is not null then 'output_too_large' end,
    case when c.error is not null then format('the task could not be created: %s', c.error)
      when not c.awaited then null
      when t.state in ('error', 'cancelled') then format('task %s of template %s %s%s', c.child_uuid, p.name,
        case t.state when 'error' then 'failed' else 'was cancelled' end, left(coalesce(': ' || t.reason, ''), 600))
      when o.problem is not null then format('task %s: %s', c.child_uuid, o.problem) end,
    case when not c.awaited and c.child_uuid is not null
      then format('00-%s-%s-%s', encode(t.trace_id, 'hex'), encode(t.root_span_id, 'hex'), lpad(to_hex(t.trace_flags & 1), 2, '0')) end
  from unnest(p_tasks, p_steps, p_attempts) w(task_uuid, step_uuid, attempt)
  join tasker.children c on c.task_uuid = w.task_uuid and c.step_uuid = w.step_uuid and c.attempt = w.attempt
  left join tasker.tasks t on t.task_uuid = c.child_uuid
  left join tasker.templates p on p.template_id = t.template_id
  left join lateral tasker.task_output(c.child_uuid) o on c.awaited and t.state in ('complete', 'resolved_manually')
  where c.error is not null or not c.awaited or t.finished_at is not null
$$;

-- When steps with `timeouts.total` must have ended, counted from when they were first ready in
-- their generation. The hint to look lies in tasker.due; this says whether it still holds.
create table tasker.step_deadlines (
  task_uuid  uuid not null,
  step_uuid  uuid not null,
  at         timestamptz not null,
  primary key (task_uuid, step_uuid)
);

revoke all on function tasker.start_children, tasker.tell_parents, tasker.cancel_children, tasker.task_output,
  tasker.last_outputs, tasker.child_ends from public;
