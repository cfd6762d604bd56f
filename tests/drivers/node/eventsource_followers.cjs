// Runs followed with server-sent events: an EventSource a run, which connects again by itself with `Last-Event-ID`. This one does not
// remember an id that comes without data, as the first of a stream does; so who lost it before the first event begins again
// where the URL says.
const { EventSource } = require('eventsource')
const { BREATH_MS, crowd, fail, hear, http, key, last, met, pause } = require('./followers.cjs')

const followed = (run) =>
  new Promise((resolve) => {
    const events = new EventSource(`${http}/events/runs/${run}?apikey=${key}&cursor=${last.get(run)}`)
    events.onopen = () => resolve()
    events.onmessage = ({ data }) => {
      if (!hear(data)) return
      events.close()
      followed(run).catch(fail)
    }
    events.onerror = ({ code, message }) => {
      met.reconnects++
      if (events.readyState !== EventSource.CLOSED) return
      // It gives up for good when it is refused, be it for too much at once; then it is for the page to come back.
      if (code !== 503) fail(`given up: ${code} ${message}`)
      pause(BREATH_MS)
        .then(() => followed(run))
        .then(resolve, fail)
    }
  })

crowd((share) => Promise.all(share.map((run) => followed(run)))).catch(fail)
