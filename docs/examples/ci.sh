#!/bin/sh
# A CI step: optimize a model, keep the reports, fail where a budget is broken.
#
#   ci.sh MODEL DATASET [SPEC] [OUT]
#
# SPEC is the JSON of POST /v1/jobs without model and dataset. OUT gets junit.xml, report.md and
# artifacts.zip. LITESMITH_URL names the service, LITESMITH_API_KEY is a key of it. Needs curl.
# Exit status: 0 every budget holds; 22 a budget is broken, a variant failed, or the request was
# refused; else curl's own.
set -eu

url=${LITESMITH_URL:-http://127.0.0.1:8000}
model=$1
dataset=$2
spec=${3:-'{"variants": ["int8"], "budgets": {"max_accuracy_drop": 0.01}}'}
out=${4:-litesmith-out}
mkdir -p "$out"

# curl with the API key, where there is one: not as an argument, which every process may read.
ask() {
  printf '%s' "${LITESMITH_API_KEY:+header = \"Authorization: Bearer $LITESMITH_API_KEY\"}" |
    curl --silent --show-error --config - "$@"
}

# One curl does it all: it sends the files and the spec, and answers when the job has ended.
# `--fail-with-body` prints what is wrong with a refused request, and ends with 22.
ask --fail-with-body \
  -F "model=@$model" -F "dataset=@$dataset" --form-string "spec=$spec" \
  --dump-header "$out/headers.txt" --output "$out/job.json" \
  "$url/v1/jobs?wait=600" || { status=$?; cat "$out/job.json" >&2; exit "$status"; }

job=$url$(sed -n 's/^[Ll]ocation: *\([^[:space:]]*\).*/\1/p' "$out/headers.txt")
# A job of more than ten minutes: wait on.
while [ "$(ask --output /dev/null --write-out '%{http_code}' "$job/verdict")" = 409 ]; do
  ask --fail "$job?wait=600" --output "$out/job.json"
done

for report in junit:junit.xml markdown:report.md; do
  ask --fail "$job/report?format=${report%%:*}" --output "$out/${report#*:}"
done
ask --fail "$job/artifacts.zip" --output "$out/artifacts.zip"
cat "$out/report.md"

# 200 where every budget holds; 412 where one is broken, which curl turns into exit status 22.
ask --fail "$job/verdict" --output /dev/null
echo "every budget holds"
