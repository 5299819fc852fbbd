-- What share of new traces is recorded.

-- One row a namespace; `*` stands for every namespace without a row. No row: every trace.
create table tasker.sampling (
  namespace  text primary key,
  ratio      double precision not null,
  constraint sampling_ratio_is_a_share check (ratio between 0 and 1)
);

-- As OpenTelemetry's TraceIdRatioBased: the last 8 bytes of the trace id without their lowest
-- bit, as a share of 2^63; so whoever samples by the same ratio chooses the same traces.
create function tasker.is_sampled(p_trace_id bytea, p_ratio double precision) returns boolean
language sql immutable parallel safe
as $$
  -- 2^63 - 1 rounds up to 2^63 as a double, so that 1 would leave a trace out.
  select p_ratio >= 1 or ((('x' || encode(substring(p_trace_id from 9 for 8), 'hex'))::bit(64)::bigint >> 1)
    & 9223372036854775807)::double precision < p_ratio * 9223372036854775808.0::double precision
$$;

-- Decides for the traces that begin here; a caller's sampled flag decides for the caller's.
create function tasker.sample(p_items tasker.submission[]) returns tasker.submission[]
language sql stable
set search_path = pg_catalog, pg_temp
as $$
  select array_agg(row(i.ordinal, i.error, i.task_uuid, i.is_new, i.namespace, i.template_id, i.input,
    i.correlation_id, i.idempotency_key, i.request_hash, i.priority, i.run_at, i.trace_id, i.remote_span_id,
    case when i.remote_span_id is null and not coalesce(tasker.is_sampled(i.trace_id, s.ratio), true)
      then 0 else i.trace_flags end::smallint,
    i.tracestate, i.baggage)::tasker.submission order by i.ordinal)
  from unnest(p_items) i
  left join lateral (
    select s.ratio from tasker.sampling s where s.namespace in (i.namespace, '*') order by s.namespace = '*' limit 1
  ) s on true
$$;

-- Sets the share of a namespace (or of `*`), audited; null forgets it. What lies outside 0 to 1
-- is clamped with a warning. Returns what holds.
create function tasker.set_sampling(
  namespace text, ratio double precision, actor text default session_user
) returns double precision
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
  v_ratio double precision := case when ratio = 'NaN' then 1 else greatest(0, least(1, ratio)) end;
begin
  if not tasker.is_owner() then
    raise exception 'sampling: only the owner of the schema may set it' using errcode = '42501';
  end if;
  if namespace is null or namespace !~ '^([*]|[a-z](_?[a-z0-9])*)$' then
    raise exception 'namespace: must be a namespace, or * for every other one' using errcode = '22023';
  end if;
  if ratio is null then
    v_ratio := null;
    delete from tasker.sampling s where s.namespace = set_sampling.namespace;
  else
    if v_ratio <> ratio then
      raise warning 'ratio: % is not between 0 and 1; % is used', ratio, v_ratio;
    end if;
    insert into tasker.sampling (namespace, ratio) values (set_sampling.namespace, v_ratio)
    on conflict on constraint sampling_pkey do update set ratio = excluded.ratio;
  end if;
  insert into tasker.audit (subject, action, actor, reason)
  values ('sampling of ' || set_sampling.namespace, 'set_sampling', left(set_sampling.actor, 100), coalesce(v_ratio::text, 'default'));
  return v_ratio;
end
$$;
