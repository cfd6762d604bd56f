//! Sessions that differ in whatever an answer may depend on ask the same in the same moments: role, session authorization,
//! settings of every kind and however made or unmade, search path, formats, parameters of equal texts. Each knows what it is
//! to see. `FLOWGATE_SEED` repeats what each does, `FLOWGATE_SOAK_SECONDS` goes on for that long.

use std::collections::HashMap;

use futures_util::future::join_all;

use crate::events::define_flow;
use crate::support::chance::{Chance, Stretch, seed};
use crate::support::pg::{TestDb, fresh_database, replica_catches_up};
use crate::support::proxy::{PATIENCE, Proxy, text};
use crate::support::raw::{
    Frame, Raw, execute, first_columns, message, parse, query, sync, transcript,
};

const FLOWS: [&str; 4] = ["a", "b", "c", "greet"];
const STYLES: [&str; 3] = ["ISO, MDY", "German, DMY", "SQL, DMY"];
const READ: &str = "select flow_slug, created_at, lower('X') from pgflow.flows";
const PARAMETERS: [&str; 3] = ["{a,b,c,greet}", "{a,greet}", "{b}"];

#[tokio::test]
async fn nobody_gets_what_another_session_would() {
    let seed = seed();
    let db = fresh_database().await;
    define_flow(&db, "greet").await;
    let direct = db.connect().await;
    let names = Names::of(&db);
    // A tenant that was never set and one that was unset are told apart by Postgres, as either is its server's history.
    let tenant = "coalesce(nullif(current_setting('app.tenant', true), ''), 'a')";
    direct
        .batch_execute(&format!(
            "select pgflow.create_flow('a'); select pgflow.create_flow('b'); select pgflow.create_flow('c');
             create schema evil; grant usage on schema evil to public;
             create function evil.lower(text) returns text immutable language sql as $$ select 'evil' $$;
             create role {one} login; create role {two} login; create role {both} login noinherit; grant {one}, {two} to {both};
             grant usage on schema pgflow to {one}, {two}, {both}; grant select on pgflow.flows to {one}, {two}, {both};
             alter table pgflow.flows enable row level security;
             create policy tenant on pgflow.flows to {one} using (flow_slug = {tenant});
             create policy others on pgflow.flows to {two} using (flow_slug <> {tenant})",
            one = names.0[Role::One as usize],
            two = names.0[Role::Two as usize],
            both = names.0[Role::Both as usize],
        ))
        .await
        .unwrap();
    let mut created = HashMap::new();
    for style in STYLES {
        direct
            .batch_execute(&format!("set datestyle = '{style}'"))
            .await
            .unwrap();
        for flow in FLOWS {
            let read = format!("select created_at from pgflow.flows where flow_slug = '{flow}'");
            created.insert((style, flow), text(&direct, &read).await);
        }
    }
    replica_catches_up().await;
    let stretch = Stretch::of(60);
    for replicas in [false, true] {
        let few = |config: &mut flowgate::config::Config| {
            config.pool.size = 3.try_into().unwrap();
            // Nor is anybody refused for being one of many.
            config.shed.target = PATIENCE;
            config.shed.window = PATIENCE;
        };
        let proxy = if replicas {
            Proxy::start(&db, few).await
        } else {
            Proxy::without_replica(&db, few).await
        };
        let clients = (0..40).map(|me| {
            let (proxy, names, created) = (&proxy, &names, &created);
            async move {
                let mut chance = Chance::of(seed, me);
                let mut me = Me::log_in(proxy, names, created, &mut chance).await;
                let mut round = 0;
                while stretch.has(round) {
                    round += 1;
                    if chance.one_in(4) {
                        me.change(&mut chance).await;
                    }
                    me.ask(&mut chance).await;
                }
            }
        });
        join_all(clients).await;
        let shared = proxy.metric("flowgate_shared_reads_total{answered_by=\"other\"}");
        assert!(shared > 0, "nothing was shared");
        println!("{shared} answers were shared");
        proxy.shut_down().await;
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Role {
    One,
    Two,
    /// Member of the others, with none of their rights until it becomes one.
    Both,
    Superuser,
}

const ROLES: [Role; 4] = [Role::One, Role::Two, Role::Both, Role::Superuser];

/// By `Role`.
struct Names([String; 4]);

impl Names {
    fn of(db: &TestDb) -> Self {
        let name = |word: &str| format!("{}_{word}", db.name);
        Self([
            name("one"),
            name("two"),
            name("both"),
            "postgres".to_owned(),
        ])
    }
}

/// A session, and what is known of it.
struct Me<'a> {
    raw: Raw,
    names: &'a Names,
    created: &'a HashMap<(&'static str, &'static str), String>,
    login: Role,
    /// By SET SESSION AUTHORIZATION.
    session: Role,
    /// By SET ROLE.
    role: Option<Role>,
    first_tenant: &'static str,
    tenant: &'static str,
    style: &'static str,
    evil: bool,
}

impl<'a> Me<'a> {
    async fn log_in(
        proxy: &Proxy,
        names: &'a Names,
        created: &'a HashMap<(&'static str, &'static str), String>,
        chance: &mut Chance,
    ) -> Self {
        let login = *chance.pick(&ROLES);
        let first_tenant = *chance.pick(&["", "b"]);
        let options = format!("-c app.tenant={first_tenant}");
        let more: &[_] = if first_tenant.is_empty() {
            &[]
        } else {
            &[("options", options.as_str())]
        };
        let user = &names.0[login as usize];
        let mut me = Self {
            raw: Raw::login(proxy.port, user, &proxy.database, more).await,
            names,
            created,
            login,
            session: login,
            role: None,
            first_tenant,
            tenant: first_tenant,
            style: STYLES[0],
            evil: false,
        };
        me.prepare().await;
        me
    }

    async fn prepare(&mut self) {
        let frames = self
            .raw
            .ask_frames(&[parse("r", &with_parameter()), sync()].concat())
            .await;
        assert_eq!(frames[0].tag, b'1', "{}", transcript(&frames));
    }

    async fn run(&mut self, sql: &str) -> Vec<Frame> {
        let frames = self.raw.ask_frames(&query(sql)).await;
        let fine = frames.iter().all(|frame| frame.tag != b'E');
        assert!(fine, "{sql}: {}", transcript(&frames));
        frames
    }

    /// Becomes another session, or nearly does.
    async fn change(&mut self, chance: &mut Chance) {
        let tenant = *chance.pick(&["a", "b", "c"]);
        match chance.below(20) {
            0..=4 => {
                self.run(&format!("set app.tenant = '{tenant}'")).await;
                self.tenant = tenant;
            }
            5 | 6 => {
                self.run(&format!(
                    "begin isolation level repeatable read; set app.tenant = '{tenant}'"
                ))
                .await;
                self.run("rollback").await;
            }
            7 | 8 => {
                let before = self.tenant;
                self.run(&format!("begin; set local app.tenant = '{tenant}'"))
                    .await;
                self.tenant = tenant;
                self.ask(chance).await;
                self.tenant = before;
                self.run("commit").await;
            }
            9 => {
                self.run("reset app.tenant").await;
                self.tenant = self.first_tenant;
            }
            10 | 11 => {
                self.style = chance.pick::<&str>(&STYLES);
                self.run(&format!("set datestyle = '{}'", self.style)).await;
            }
            12 | 13 => {
                self.evil = chance.one_in(2);
                let path = if self.evil {
                    "evil, pg_catalog"
                } else {
                    "public"
                };
                self.run(&format!("set search_path = {path}")).await;
            }
            14..=16 if self.session == Role::Both => {
                self.role = *chance.pick(&[None, Some(Role::One), Some(Role::Two)]);
                let name = self.role.map(|role| &self.names.0[role as usize]);
                let name = name.map_or("none", String::as_str).to_owned();
                self.run(&format!("set role {name}")).await;
            }
            14..=17 if self.login == Role::Superuser => {
                self.session = *chance.pick(&ROLES);
                self.role = None;
                let name = &self.names.0[self.session as usize];
                self.run(&format!("set session authorization {name}")).await;
            }
            18 => {
                self.run("discard all").await;
                (self.session, self.role) = (self.login, None);
                (self.tenant, self.style, self.evil) = (self.first_tenant, STYLES[0], false);
                self.prepare().await;
            }
            19 if chance.one_in(4) => {
                self.run(&format!(
                    "select set_config('app.tenant', '{tenant}', false)"
                ))
                .await;
                self.tenant = tenant;
            }
            _ => {}
        }
    }

    async fn ask(&mut self, chance: &mut Chance) {
        let parameter = *chance.pick(&PARAMETERS);
        let binary = chance.one_in(2);
        let (form, bytes) = match chance.below(3) {
            0 => ("simple", query(&format!("{READ} order by 1"))),
            1 => {
                let all = [
                    parse("", &with_parameter()),
                    bind(parameter, "", binary),
                    execute("", 0),
                    sync(),
                ];
                ("unnamed", all.concat())
            }
            _ => {
                let all = [bind(parameter, "r", binary), execute("", 0), sync()];
                ("named", all.concat())
            }
        };
        let simple = form == "simple";
        let frames = self.raw.ask_frames(&bytes).await;
        let asked_for: Vec<_> = parameter.trim_matches(['{', '}']).split(',').collect();
        let tenant = if self.tenant.is_empty() {
            "a"
        } else {
            self.tenant
        };
        let seen = FLOWS.into_iter().filter(|flow| {
            let visible = match self.role.unwrap_or(self.session) {
                Role::One => *flow == tenant,
                Role::Two => *flow != tenant,
                Role::Both => false,
                Role::Superuser => true,
            };
            visible && (simple || asked_for.contains(flow))
        });
        let seen: Vec<_> = seen.collect();
        let who = format!(
            "{form}, binary {binary}, {parameter}, {:?} {:?} {tenant}: {}",
            self.session,
            self.role,
            transcript(&frames)
        );
        if binary && !simple {
            // Eight bytes of time, by now of no style.
            let rows: Vec<_> = frames.iter().filter(|frame| frame.tag == b'D').collect();
            assert_eq!(rows.len(), seen.len(), "{who}");
            for (row, flow) in rows.iter().zip(seen) {
                let slug = 6 + flow.len();
                assert_eq!(&row.body[6..slug], flow.as_bytes(), "{who}");
                assert_eq!(row.body[slug..slug + 4], 8_i32.to_be_bytes(), "{who}");
                assert!(row.body.ends_with(self.lower().as_bytes()), "{who}");
            }
        } else {
            assert_eq!(first_columns(&frames), seen, "{who}");
            for (row, flow) in frames.iter().filter(|frame| frame.tag == b'D').zip(seen) {
                let expected = [
                    flow,
                    self.created[&(self.style, flow)].as_str(),
                    self.lower(),
                ];
                assert_eq!(row.texts(), expected, "{who}");
            }
        }
    }

    fn lower(&self) -> &'static str {
        if self.evil { "evil" } else { "x" }
    }
}

fn with_parameter() -> String {
    format!("{READ} where flow_slug = any ($1::text[]) order by 1")
}

/// Its one parameter in text, its results in either format.
fn bind(parameter: &str, statement: &str, binary: bool) -> Vec<u8> {
    let mut body = vec![0];
    body.extend_from_slice(statement.as_bytes());
    body.extend_from_slice(&[0, 0, 0, 0, 1]);
    body.extend_from_slice(&i32::try_from(parameter.len()).unwrap().to_be_bytes());
    body.extend_from_slice(parameter.as_bytes());
    body.extend_from_slice(&[0, 1, 0, u8::from(binary)]);
    message(b'B', &body)
}
