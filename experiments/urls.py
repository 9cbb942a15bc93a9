"""The site map of experiments."""

from django.urls import path

from experiments import views

urlpatterns = [
    path("", views.home, name="home"),
    path("train/", views.train, name="train"),
    path("train/estimate/", views.train_estimate, name="train_estimate"),
    path("profile/", views.profile, name="profile"),
    path("experiments/<uuid:pk>/", views.experiment, name="experiment"),
    path("experiments/<uuid:pk>/metrics.json", views.metrics, name="metrics"),
    path("experiments/<uuid:pk>/metrics.csv", views.metrics_csv, name="metrics_csv"),
    path("experiments/<uuid:pk>/spec.json", views.spec_json, name="spec_json"),
    path("experiments/<uuid:pk>/edit/", views.edit, name="edit"),
    path("experiments/<uuid:pk>/stop/", views.stop, name="stop"),
    path("experiments/<uuid:pk>/resume/", views.resume, name="resume"),
    path("experiments/<uuid:pk>/delete/", views.delete, name="delete"),
    path("experiments/<uuid:pk>/<slug:name>/log/", views.log, name="log"),
    path("experiments/<uuid:pk>/<slug:name>/checkpoint/<slug:checkpoint>/", views.checkpoint, name="checkpoint"),
    path("docs/", views.docs, name="docs"),
    path("docs/<slug:page>/", views.docs, name="docs_page"),
]
