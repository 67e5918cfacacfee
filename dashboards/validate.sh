#!/usr/bin/env bash
# Checks dashboards against Grafana's own types: the dashboard, the options and fields of each kind of panel, and the
# queries of the Prometheus data source, which the dashboard's type leaves open. Unknown keys and values are errors.
#
#   dashboards/validate.sh [file.json ...]      by default async_rl/observe/assets/grafana/async_rl.json
#
# Needs npm. The types are those of @grafana/schema and of one file of @grafana/prometheus; they are fetched once, in
# the versions below, into ASYNC_RL_CACHE (by default ~/.cache/async-rl), and are no part of this repository. A file is
# written out as a TypeScript literal and type-checked, because only a literal makes the compiler report unknown keys.
set -euo pipefail

GRAFANA=13.2.3   # the image of async_rl/observe/assets/compose.yaml
TYPESCRIPT=5.9.3

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
types="${ASYNC_RL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/async-rl}/grafana-$GRAFANA-typescript-$TYPESCRIPT"

if [[ ! -f $types/complete ]]; then
  fresh=$(mktemp -d)
  trap 'rm -rf "$fresh"' EXIT
  cd "$fresh"
  echo '{"private": true}' > package.json
  npm install --silent --ignore-scripts --no-audit --no-fund --no-package-lock \
    "@grafana/schema@$GRAFANA" "typescript@$TYPESCRIPT"
  # Only its types: all of the package brings an editor and React.
  npm pack --silent "@grafana/prometheus@$GRAFANA" > /dev/null
  tar -xzf grafana-prometheus-*.tgz package/dist/types/dataquery.d.ts
  mv package/dist/types/dataquery.d.ts prometheus.d.ts
  rm -r package grafana-prometheus-*.tgz
  touch complete
  mkdir -p "$(dirname "$types")"
  # The first of two concurrent runs wins; both have the same files.
  mv -T "$fresh" "$types" 2> /dev/null || [[ -f $types/complete ]]
  cd "$here"
fi

work=$(mktemp -d)
trap 'rm -rf "$work" "${fresh:-$work}"' EXIT
ln -s "$types/node_modules" "$work/node_modules"
cp "$types/prometheus.d.ts" "$work/prometheus.d.ts"
raw="@grafana/schema/dist/types/raw"
cat > "$work/grafana.ts" <<TS
import type * as raw from "./node_modules/$raw/dashboard/x/types.gen";
import type * as heatmap from "./node_modules/$raw/composable/heatmap/panelcfg/x/types.gen";
import type * as stat from "./node_modules/$raw/composable/stat/panelcfg/x/types.gen";
import type * as timeline from "./node_modules/$raw/composable/statetimeline/panelcfg/x/types.gen";
import type * as timeseries from "./node_modules/$raw/composable/timeseries/panelcfg/x/types.gen";
import type { Prometheus } from "./prometheus";
TS
cat >> "$work/grafana.ts" <<'TS'

/** A type as its JSON is written: an enum is one of its values. */
type Plain<T> = unknown extends T ? unknown
  : T extends string ? `${T}`
  : T extends number | boolean | null | undefined ? T
  : T extends readonly (infer Item)[] ? Plain<Item>[]
  : { [Key in keyof T]: Plain<T[Key]> };

/** `interval` is of the query that the data source extends in its code. */
type Query = Plain<Prometheus> & { interval?: string };

interface Panel<Type extends string, Options, Custom>
  extends Omit<Plain<raw.Panel>, "type" | "options" | "fieldConfig" | "targets"> {
  type: Type;
  options: Plain<Options>;
  fieldConfig: Omit<Plain<raw.FieldConfigSource>, "defaults"> & {
    defaults: Omit<Plain<raw.FieldConfig>, "custom"> & { custom?: Plain<Custom> };
  };
  targets: Query[];
}

/** A panel without a graph has no custom fields. */
type None = Record<string, never>;

/** Keys of an interval variable that the schema leaves out. */
interface Variable extends Plain<raw.VariableModel> {
  auto?: boolean;
  auto_count?: number;
  auto_min?: string;
}

/** The format of an annotation's text is the Prometheus data source's own. */
interface Annotation extends Omit<Plain<raw.AnnotationQuery>, "target"> {
  target: Query;
  titleFormat?: string;
  textFormat?: string;
  tagKeys?: string;
}

export interface Dashboard extends Omit<Plain<raw.Dashboard>, "panels" | "annotations" | "templating"> {
  panels: (
    | Plain<raw.RowPanel>
    | Panel<"timeseries", timeseries.Options, timeseries.FieldConfig>
    | Panel<"stat", stat.Options, None>
    | Panel<"heatmap", heatmap.Options, heatmap.FieldConfig>
    | Panel<"state-timeline", timeline.Options, timeline.FieldConfig>
  )[];
  annotations: { list: Annotation[] };
  templating: { list: Variable[] };
}
TS

[[ $# -gt 0 ]] || set -- "$here/../async_rl/observe/assets/grafana/async_rl.json"
for file in "$@"; do
  name=$(basename "$file" .json)
  { echo 'import type { Dashboard } from "./grafana"; export const dashboard: Dashboard ='; cat "$file"; } > "$work/check_$name.ts"
done
cd "$work"
# skipLibCheck: the query's file names types of packages that are not here.
cat > tsconfig.json <<'JSON'
{
  "compilerOptions": {
    "noEmit": true, "strict": true, "skipLibCheck": true, "types": [],
    "target": "es2022", "module": "esnext", "moduleResolution": "bundler"
  },
  "include": ["*.ts"]
}
JSON
node node_modules/typescript/bin/tsc --pretty false
