{{- /* What the values change in a manifest, in place; each of these yields no text. */ -}}

{{- define "fedtune.changed" -}}
{{- $made := .made }}
{{- $values := .top.Values }}
{{- $_ := set $made.metadata "namespace" .top.Release.Namespace }}
{{- if eq $values.role "lead" }}
{{- $_ := set $made.metadata "name" (printf "fedtune-lead-%s" $values.run.name) }}
{{- end }}
{{- if has $made.kind (list "StatefulSet" "Job") }}
{{- $pod := $made.spec.template.spec }}
{{- include "fedtune.pod" (dict "pod" $pod "top" .top) }}
{{- include "fedtune.process" (dict "pod" $pod "values" $values) }}
{{- range $claim := $made.spec.volumeClaimTemplates }}
{{- with index $values.storage $claim.metadata.name }}
{{- $_ := set $claim.spec.resources.requests "storage" (.size | default $claim.spec.resources.requests.storage) }}
{{- with .storageClassName }}
{{- $_ := set $claim.spec "storageClassName" . }}
{{- end }}
{{- end }}
{{- end }}
{{- else if eq $made.kind "CronJob" }}
{{- $pod := $made.spec.jobTemplate.spec.template.spec }}
{{- include "fedtune.pod" (dict "pod" $pod "top" .top) }}
{{- $_ := set $made.spec "schedule" ($values.backup.schedule | default $made.spec.schedule) }}
{{- $_ := set (first (first $pod.containers).env) "value" ($values.backup.keepDays | toString) }}
{{- else if eq $made.kind "NetworkPolicy" }}
{{- if $made.spec.egress }}
{{- $names := first $made.spec.egress }}
{{- range $values.dns.cidrs }}
{{- $_ := set $names "to" (append $names.to (dict "ipBlock" (dict "cidr" .))) }}
{{- end }}
{{- $server := last $made.spec.egress }}
{{- $_ := set (first $server.to).ipBlock "cidr" $values.server.cidr }}
{{- $_ := set (first $server.ports) "port" $values.server.port }}
{{- end }}
{{- else if eq $made.kind "PodDisruptionBudget" }}
{{- $_ := set $made.spec "maxUnavailable" $values.disruption.maxUnavailable }}
{{- else if and (eq $made.kind "Service") $values.service.annotations }}
{{- $_ := set $made.metadata "annotations" $values.service.annotations }}
{{- end }}
{{- end }}

{{- /* Of every pod: where it comes from, and where it may run. */ -}}
{{- define "fedtune.pod" -}}
{{- $pod := .pod }}
{{- $values := .top.Values }}
{{- $image := printf "%s:%s" $values.image.repository ($values.image.tag | default .top.Chart.AppVersion) }}
{{- range concat ($pod.initContainers | default list) $pod.containers }}
{{- $_ := set . "image" $image }}
{{- end }}
{{- range $values.image.pullSecrets }}
{{- $_ := set $pod "imagePullSecrets" (append ($pod.imagePullSecrets | default list) (dict "name" .)) }}
{{- end }}
{{- with $values.nodeSelector }}
{{- $_ := set $pod "nodeSelector" . }}
{{- end }}
{{- with $values.tolerations }}
{{- $_ := set $pod "tolerations" . }}
{{- end }}
{{- range $volume := $pod.volumes }}
{{- with index $values.claims $volume.name }}
{{- $_ := set $volume.persistentVolumeClaim "claimName" . }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Of the pod that is not a backup's: what it may use, when it is killed, and which run it is. */ -}}
{{- define "fedtune.process" -}}
{{- $pod := .pod }}
{{- $values := .values }}
{{- $container := first $pod.containers }}
{{- $asked := $container.resources.requests }}
{{- $_ := set $asked "cpu" ($values.resources.cpu | default $asked.cpu) }}
{{- $_ := set $asked "memory" ($values.resources.memory | default $asked.memory) }}
{{- $limits := $container.resources.limits }}
{{- $_ := set $limits "memory" ($values.resources.memoryLimit | default $limits.memory) }}
{{- if $values.gpus }}
{{- $_ := set $limits "nvidia.com/gpu" ($values.gpus | toString) }}
{{- end }}
{{- if $values.stopWithin }}
{{- $_ := set $pod "terminationGracePeriodSeconds" $values.stopWithin }}
{{- end }}
{{- if eq $values.role "lead" }}
{{- $args := list }}
{{- range $container.args }}
{{- $args = append $args (ternary (printf "name=%s" $values.run.name) . (hasPrefix "name=" .)) }}
{{- end }}
{{- $_ := set $container "args" (concat $args $values.run.settings) }}
{{- range $pod.volumes }}
{{- with .configMap }}
{{- $_ := set . "name" (printf "fedtune-lead-%s" $values.run.name) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
