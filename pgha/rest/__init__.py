"""The REST API: what load balancers, monitoring, operators and peers see of this node.

    loop ── publish_pass(…) ──► Board ──► App ──► server        (reading: always from the last pass, never waits for it)
    loop ◄── facts ── Requests ◄── requests.py ◄── App          (changing: REST never acts, it asks and waits for the outcome)

server.py     exact health requests from prebuilt bytes, the rest by h11; listen.py: its sockets and limits
wire.py       requests and responses as values and bytes
routes.py     which answer for which path (reading); requests.py: for what changes something
health.py     which status and why (pure); bodies.py, metrics.py: what is in the answers
pages.py      the long answers: made once, given out one at a time; redaction.py: what nobody is shown
parked.py     who waits in a handler, and how many may
stream.py     GET /pgha/events: who follows what happens (WebSocket, or a page)
published.py  the frozen value of one pass, and the board that it hangs on
access.py     who may change something; tls.py: certificates
"""
