-- Edges of the DAG: `step_slug` (the child) waits for `dep_slug` (the parent). The primary key finds children, the index parents.
-- Written by: `add_step`. Read by: everything that moves a run on.
create table if not exists pgflow.deps (
    flow_slug  text not null,
    dep_slug   text not null,
    step_slug  text not null,
    created_at timestamptz not null default now(),
    constraint deps_pkey primary key (flow_slug, dep_slug, step_slug),
    constraint deps_flow_slug_fkey foreign key (flow_slug) references pgflow.flows (flow_slug),
    constraint deps_flow_slug_dep_slug_fkey foreign key (flow_slug, dep_slug)
        references pgflow.steps (flow_slug, step_slug),
    constraint deps_flow_slug_step_slug_fkey foreign key (flow_slug, step_slug)
        references pgflow.steps (flow_slug, step_slug),
    constraint deps_check check (dep_slug <> step_slug)
);

create index if not exists deps_flow_slug_step_slug_idx on pgflow.deps (flow_slug, step_slug);
