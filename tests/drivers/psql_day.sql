-- A day's work with psql. Run at Postgres itself and through the proxy; the two outputs must be the same.
\pset pager off
create table s (id serial primary key, t text, n numeric, j jsonb, a int[]);
insert into s (t, n, j, a) select 'row' || i, i * 1.5, jsonb_build_object('i', i), array[i, i + 1] from generate_series(1, 200) i;
select * from s order by id limit 5;
select count(*), sum(n) from s \gdesc
select count(*) as c, sum(n) as sm from s \gset
\echo :c :sm
select 'select ' || i from generate_series(1, 4) i \gexec
\copy (select id, t from s order by id limit 3) to stdout
create temp table ct (id int, t text);
copy ct from stdin;
9	nine
10	ten
\.
copy ct from stdin;
x	bad
\.
copy ct to stdout with (format csv, header);
select * from ct;
discard all;
select count(*) from ct;
begin;
insert into s (t) values ('a');
savepoint a;
select 1/0;
rollback to a;
insert into s (t) values ('b');
commit;
begin;
select nope;
select 1;
commit;
do $$ begin raise notice 'hi'; raise warning 'w'; end $$;
select 1; select 2; select 3/0; select 4;
select 1\; select 2\; select 3/0\; select 4;
begin\; select 1\; commit;
set search_path = pg_catalog;
show search_path;
reset search_path;
show search_path;
set timezone = 'Asia/Tokyo';
select timestamptz '2020-01-01 00:00Z';
reset timezone;
set client_encoding = latin1;
\encoding
select 'é';
reset client_encoding;
\encoding
prepare p (int) as select $1 + 1;
execute p (1);
deallocate p;
execute p (1);
select $1::int + $2::int \bind 4 5 \g
\set FETCH_COUNT 7
select id from s order by id limit 20;
\unset FETCH_COUNT
begin; declare c cursor for select id from s order by id; fetch 3 c; move 2 c; fetch 1 c; close c; commit;
declare h cursor with hold for select id from s order by id;
fetch 2 h; close h;
listen foo; unlisten foo;
\d s
\df pg_catalog.abs
explain (costs off) select * from s where id = 1;
vacuum s;
\errverbose
insert into s (id) values (1);
\errverbose
set local work_mem = '1MB';
begin; set local work_mem = '1MB'; show work_mem; commit; show work_mem;
set work_mem = '2MB'; begin; set work_mem = '3MB'; rollback; show work_mem; reset all; show work_mem;
begin isolation level serializable read only deferrable; show transaction_isolation; insert into s (t) values ('q'); rollback;
begin; commit and chain; show transaction_isolation; rollback;
set default_transaction_read_only = on; insert into s (t) values ('q'); set default_transaction_read_only = off;
set statement_timeout = '50ms'; select pg_sleep(10); reset statement_timeout;
set application_name = 'foo'; show application_name;
select pg_advisory_lock(5); select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid(); select pg_advisory_unlock(5);
select repeat('x', 3000000) as r \gset
select length(:'r');
;
select;
values (1), (2);
select 1 /* unterminated
;
