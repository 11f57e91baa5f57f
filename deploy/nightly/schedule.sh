#!/usr/bin/env bash
# Makes (or changes) the Cloud Scheduler job that launches the Flex Template every night.
#
#     PROJECT=… REGION=… BUCKET=… deploy/nightly/schedule.sh
#
# What is launched is flex_template_launch.json. The service account needs roles/dataflow.admin on the project
# and roles/iam.serviceAccountUser on the account that the workers run as.
set -euo pipefail

: "${PROJECT:?}" "${REGION:?}" "${BUCKET:?}"
NAME=${NAME:-tracin-beam-nightly}
SCHEDULE=${SCHEDULE:-15 2 * * *}
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-tracin-beam-scheduler@$PROJECT.iam.gserviceaccount.com}

body=$(mktemp)
trap 'rm -f "$body"' EXIT
sed -e "s/BUCKET/$BUCKET/g" -e "s/PROJECT/$PROJECT/g" \
  "$(dirname "$0")/flex_template_launch.json" >"$body"

verb=create headers=--headers
if gcloud scheduler jobs describe "$NAME" --project="$PROJECT" --location="$REGION" >/dev/null 2>&1; then
  verb=update headers=--update-headers
fi
# A launch is tried again only where none was made: two jobs of one name cannot run at a time.
gcloud scheduler jobs "$verb" http "$NAME" \
  --project="$PROJECT" \
  --location="$REGION" \
  --schedule="$SCHEDULE" \
  --time-zone=Etc/UTC \
  --uri="https://dataflow.googleapis.com/v1b3/projects/$PROJECT/locations/$REGION/flexTemplates:launch" \
  --http-method=post \
  "$headers"=Content-Type=application/json \
  --message-body-from-file="$body" \
  --oauth-service-account-email="$SERVICE_ACCOUNT" \
  --oauth-token-scope=https://www.googleapis.com/auth/cloud-platform \
  --attempt-deadline=3m \
  --max-retry-attempts=3 \
  --min-backoff=60s
