-- Prints what wrk measured as JSON. Arguments: method, bytes of the request body.

function init(args)
   wrk.method = args[1]
   local size = tonumber(args[2])
   if size > 0 then
      wrk.body = string.rep("x", size)
      wrk.headers["Content-Type"] = "application/octet-stream"
   end
end

function done(summary, latency)
   local errors = summary.errors
   io.write(string.format(
      '\n{"requests": %d, "seconds": %.6f, "p50": %.1f, "p90": %.1f, "p99": %.1f, ' ..
      '"refused": %d, "broken": %d, "timeouts": %d}\n',
      summary.requests, summary.duration / 1e6,
      latency:percentile(50), latency:percentile(90), latency:percentile(99),
      errors.status, errors.connect + errors.read + errors.write, errors.timeout))
end
