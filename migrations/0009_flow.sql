-- Flow control: what an operator pauses, and how much may be in flight at once or begin in a
-- time. All of it is admission before send, so a task that nothing limits never reads these.

create table tasker.paused_queues (
  queue      text primary key,
  actor      text not null,
  reason     text,
  paused_at  timestamptz not null default clock_timestamp()
);

-- The namespace of a queue of steps, or null: worker_shop and worker_shop__slow are of shop.
create function tasker.queue_namespace(p_queue text) returns text
language sql immutable parallel safe
as $$ select case when p_queue like 'worker\_%' then split_part(substring(p_queue from 8), '__', 1) end $$;

-- Nothing more is sent to a paused queue, and nothing in it is claimed; what runs runs on.
-- Returns 'accepted', or why not. Again is no error: the new reason takes the old one's place.
create function tasker.pause_queue(
  queue text, reason text default null, actor text default session_user
) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
begin
  if tasker.queue_namespace(queue) is null or not exists (select from pgmq.meta m where m.queue_name = queue)
    or not tasker.may_use(tasker.queue_namespace(queue)) then
    return 'no such queue of steps; `tasker queue list` shows those that are';
  end if;
  insert into tasker.paused_queues as p (queue, actor, reason) values (queue, left(actor, 100), left(reason, 1000))
  on conflict on constraint paused_queues_pkey do update set actor = excluded.actor, reason = excluded.reason;
  insert into tasker.audit (subject, action, actor, reason)
  values ('queue ' || queue, 'pause', left(actor, 100), left(reason, 1000));
  perform pg_notify('tasker', 'admit');
  return 'accepted';
end
$$;

-- Lets a paused queue go on: what lies in it is claimed again, what was held is sent.
create function tasker.resume_queue(
  queue text, reason text default null, actor text default session_user
) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
begin
  if not coalesce(tasker.may_use(tasker.queue_namespace(queue)), false) then
    return 'no such queue of steps; `tasker queue list` shows those that are';
  end if;
  delete from tasker.paused_queues p where p.queue = resume_queue.queue;
  if not found then
    return 'the queue is not paused';
  end if;
  insert into tasker.audit (subject, action, actor, reason)
  values ('queue ' || queue, 'resume', left(actor, 100), left(reason, 1000));
  perform pg_notify('tasker', 'admit');
  perform tasker.wake(queue);
  return 'accepted';
end
$$;

revoke all on all functions in schema tasker from public;
