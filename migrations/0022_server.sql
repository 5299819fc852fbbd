-- What a session of somebody else's may have set changes no id of ours: with
-- standard_conforming_strings off, the server took the backslash of '\x00' for an escape.
create or replace function tasker.span_id(
  p_trace_id bytea, p_entity uuid, p_generation bigint, p_attempt bigint, p_kind int, p_ordinal bigint
) returns bytea
language sql immutable parallel safe
as $$
  -- One expression, so that the planner inlines it.
  select coalesce(nullif(substring(sha256(
    'tasker-span-v1'::bytea || p_trace_id || uuid_send(p_entity) || int8send(p_generation)
    || int8send(p_attempt) || substring(int4send(p_kind) from 4) || int8send(p_ordinal)) from 1 for 8),
    int8send(0)), int8send(1))
$$;

-- The same for the rest: a function that is not inlined anyway, and has a backslash in it, says
-- how it is to be read.
do $$
declare
  v_function regprocedure;
begin
  for v_function in
    select p.oid from pg_catalog.pg_proc p
    where p.pronamespace = 'tasker'::regnamespace and p.proconfig is not null and strpos(p.prosrc, chr(92)) > 0
  loop
    execute format('alter function %s set standard_conforming_strings = on', v_function);
  end loop;
end
$$;
