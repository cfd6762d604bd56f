//! What browsers of other origins may do: answers preflights and names the origins of `http.cors` on every response. Guards
//! nothing by itself (`identity.rs` does). Called by `mod.rs` around all routes, and by `realtime` for sockets.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;

/// Asked for by supabase-js and EventSource polyfills, where a preflight names none.
const HEADERS: HeaderValue = HeaderValue::from_static(
    "apikey, authorization, content-profile, accept-profile, content-type, x-client-info, prefer, last-event-id, range",
);
const METHODS: HeaderValue = HeaderValue::from_static("GET, HEAD, POST, OPTIONS");
const AGE: HeaderValue = HeaderValue::from_static("86400");
const EXPOSED: HeaderValue = HeaderValue::from_static("content-range, retry-after");

/// Origins that pages may come from.
#[derive(Clone)]
pub(super) struct Origins(Arc<[String]>);

impl Origins {
    pub(super) fn new(origins: &[String]) -> Self {
        Self(origins.into())
    }

    fn any(&self) -> bool {
        self.0.iter().any(|allowed| allowed == "*")
    }

    /// Whether a page from there may use us; what comes from no page, or from our own, may.
    pub(super) fn admits(&self, headers: &HeaderMap) -> bool {
        let Some(origin) = headers.get(header::ORIGIN) else {
            return true;
        };
        let Ok(origin) = origin.to_str() else {
            return false;
        };
        let host = headers
            .get(header::HOST)
            .and_then(|host| host.to_str().ok());
        let own = origin.split_once("://").map(|(_, host)| host);
        self.any()
            || self.0.iter().any(|allowed| allowed == origin)
            || (own.is_some() && own == host)
    }

    fn named_for(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        if self.any() {
            return Some(HeaderValue::from_static("*"));
        }
        let origin = headers.get(header::ORIGIN)?;
        let listed = |origin: &str| self.0.iter().any(|allowed| allowed == origin);
        origin.to_str().is_ok_and(listed).then(|| origin.clone())
    }
}

pub(super) async fn apply(
    State(origins): State<Origins>,
    request: Request,
    next: Next,
) -> Response {
    let named = origins.named_for(request.headers());
    let preflight = request.method() == Method::OPTIONS;
    let mut response = if preflight {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::OK;
        let asked = request
            .headers()
            .get(header::ACCESS_CONTROL_REQUEST_HEADERS)
            .cloned();
        let headers = response.headers_mut();
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, METHODS);
        headers.insert(
            header::ACCESS_CONTROL_ALLOW_HEADERS,
            asked.unwrap_or(HEADERS),
        );
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, AGE);
        response
    } else {
        next.run(request).await
    };
    let headers = response.headers_mut();
    if !origins.any() && !origins.0.is_empty() {
        headers.append(header::VARY, HeaderValue::from_static("origin"));
    }
    if let Some(origin) = named {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
    }
    response
}
