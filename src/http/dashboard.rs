//! The dashboard: one page at `/`, its style and scripts, as files in this binary. Reads nothing and knows nobody: what it shows, the
//! browser asks of the other routes, with its own key. Routed by `mod.rs`.
//!
//! Nothing inline and nothing from elsewhere, which the policy sent along holds the page to: whatever a run's payload says, no
//! browser takes it for a script.

use std::net::SocketAddr;

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

const PAGE: &str = include_str!("dashboard/index.html");

const FILES: &[(&str, &str, &str)] = &[
    (
        "/dashboard/style.css",
        CSS,
        include_str!("dashboard/style.css"),
    ),
    (
        "/dashboard/api.js",
        SCRIPT,
        include_str!("dashboard/api.js"),
    ),
    (
        "/dashboard/app.js",
        SCRIPT,
        include_str!("dashboard/app.js"),
    ),
    (
        "/dashboard/dom.js",
        SCRIPT,
        include_str!("dashboard/dom.js"),
    ),
    (
        "/dashboard/graph.js",
        SCRIPT,
        include_str!("dashboard/graph.js"),
    ),
    (
        "/dashboard/health.js",
        SCRIPT,
        include_str!("dashboard/health.js"),
    ),
    (
        "/dashboard/run.js",
        SCRIPT,
        include_str!("dashboard/run.js"),
    ),
    (
        "/dashboard/runs.js",
        SCRIPT,
        include_str!("dashboard/runs.js"),
    ),
    (
        "/dashboard/snippets.js",
        SCRIPT,
        include_str!("dashboard/snippets.js"),
    ),
    (
        "/dashboard/waterfall.js",
        SCRIPT,
        include_str!("dashboard/waterfall.js"),
    ),
];

/// Where Postgres' protocol is spoken, for the page's snippets.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) postgres: SocketAddr,
    pub(crate) database: String,
}

pub(super) fn routes<S: Clone + Send + Sync + 'static>(place: &Place) -> Router<S> {
    let page = PAGE
        .replace("{{postgres}}", &place.postgres.to_string())
        .replace("{{database}}", &escaped(&place.database));
    let route = |router: Router<S>, path: &str, file: File| {
        router.route(
            path,
            get(move |headers: HeaderMap| {
                let answer = file.answer(&headers);
                async move { answer }
            }),
        )
    };
    let router = route(Router::new(), "/", File::new(HTML, page.into()));
    FILES.iter().fold(router, |router, (path, kind, text)| {
        route(
            router,
            path,
            File::new(kind, Bytes::from_static(text.as_bytes())),
        )
    })
}

/// For an attribute's value.
fn escaped(text: &str) -> String {
    let mut safe = String::new();
    for letter in text.chars() {
        match letter {
            '&' => safe.push_str("&amp;"),
            '"' => safe.push_str("&quot;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            letter => safe.push(letter),
        }
    }
    safe
}

#[derive(Clone)]
struct File {
    kind: &'static str,
    bytes: Bytes,
    /// Changes with the bytes.
    tag: HeaderValue,
}

impl File {
    fn new(kind: &'static str, bytes: Bytes) -> Self {
        // FNV-1a: told from another version of itself, no more is asked.
        let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
        // Weak, since compression may change the bytes sent.
        let tag = format!("W/\"{hash:016x}\"");
        Self {
            kind,
            bytes,
            tag: HeaderValue::try_from(tag).expect("hexadecimal digits and quotes"),
        }
    }

    fn answer(&self, asked: &HeaderMap) -> Response {
        let had = asked.get_all(header::IF_NONE_MATCH).iter();
        let had = had.filter_map(|tags| tags.to_str().ok());
        let ours = self.tag.to_str().unwrap_or_default();
        let unchanged = had
            .flat_map(|tags| tags.split(','))
            .any(|tag| tag.trim() == ours);
        let common: [(HeaderName, HeaderValue); 2] = [
            (header::ETAG, self.tag.clone()),
            // Kept, and asked for again each time: a new version is seen at once.
            (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        ];
        if unchanged {
            return (StatusCode::NOT_MODIFIED, common).into_response();
        }
        let own = [
            (header::CONTENT_TYPE, self.kind),
            (header::CONTENT_SECURITY_POLICY, POLICY),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (header::REFERRER_POLICY, "no-referrer"),
        ];
        (common, own, self.bytes.clone()).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(database: &str) -> String {
        PAGE.replace("{{database}}", &escaped(database))
    }

    fn ask(file: &File, tag: Option<&str>) -> Response {
        let mut headers = HeaderMap::new();
        if let Some(tag) = tag {
            headers.insert(header::IF_NONE_MATCH, tag.parse().unwrap());
        }
        file.answer(&headers)
    }

    #[test]
    fn a_file_is_sent_once_and_then_known_by_its_tag() {
        let file = File::new(CSS, Bytes::from_static(b"a {}"));
        let first = ask(&file, None);
        assert_eq!(first.status(), StatusCode::OK);
        assert_eq!(first.headers()[header::CONTENT_TYPE], CSS);
        assert_eq!(first.headers()[header::CONTENT_SECURITY_POLICY], POLICY);
        let tag = first.headers()[header::ETAG].to_str().unwrap().to_owned();
        let again = ask(&file, Some(&format!("\"other\", {tag}")));
        assert_eq!(again.status(), StatusCode::NOT_MODIFIED);
        let changed = File::new(CSS, Bytes::from_static(b"b {}"));
        assert_eq!(ask(&changed, Some(&tag)).status(), StatusCode::OK);
    }

    #[test]
    fn a_databases_name_stays_a_name() {
        let page = page("a\"><script>&");
        assert!(
            page.contains("data-database=\"a&quot;&gt;&lt;script&gt;&amp;\""),
            "{page}"
        );
    }

    /// The policy would refuse it, in silence.
    #[test]
    fn nothing_is_inline_and_every_file_named_is_there() {
        assert!(!PAGE.contains(" style=") && !PAGE.contains("<style"));
        assert!(!PAGE.contains(" onclick") && PAGE.matches("<script").count() == 1);
        let texts = FILES.iter().map(|(_, _, text)| *text).chain([PAGE]);
        for text in texts {
            assert!(!text.contains("innerHTML") && !text.contains("insertAdjacentHTML"));
            for name in text.split("\"/dashboard/").skip(1) {
                let name = name.split('"').next().unwrap();
                let path = format!("/dashboard/{name}");
                assert!(FILES.iter().any(|(known, _, _)| *known == path), "{path}");
            }
        }
    }
}
