-- The schema that holds everything of ours. PGMQ keeps its own, `pgmq`.
create schema if not exists tasker;
