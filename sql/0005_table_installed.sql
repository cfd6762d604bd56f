-- What is installed in this database, one row a component ('flowgate', 'pgflow').
-- Written by: the installer, under its advisory lock. Read by: the installer, `doctor`. Failure: aborts the install.
create table if not exists flowgate.installed (
    component    text primary key,
    version      text not null,
    installed_at timestamptz not null default now(),
    details      jsonb
);
